"""Which gradients are added up together, in which order: a pure function of the step, so that all workers do the same.

Gradients come in the order of the backward pass, the last layer's first. A stage is some that follow each other, large
enough that handing them over is worth it. What makes a stage is run as a piece of its own (`partition.in_turn`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from millrace.graph.graph import Graph, spec_of
from millrace.replicas.collective import REDUCED

STAGES = 4
LEAST_BYTES = 1_000_000  # of a stage: below that, a message costs more than its bytes

Stages = tuple[tuple[str, ...], ...]


def early_stages(gradients: Graph, exchanged: Sequence[str]) -> Stages:
    """The gradients that can be added up while others are computed, by stages; the rest comes when all is computed.

    Args: gradients: the half of the step that makes them. exchanged: the fetches that are exchanged.
    Returns: names of fetches, each once. Nothing for a step that has too few bytes to be worth it.
    """
    position = {node.name: place for place, node in enumerate(gradients.fx.nodes)}
    specs = {name: spec_of(gradients.node(gradients.fetches[name])) for name in exchanged}
    sizes = {name: spec.size_bytes for name, spec in specs.items() if spec is not None and spec.dtype in REDUCED}
    share = max(sum(sizes.values()) / STAGES, LEAST_BYTES)
    stages: list[list[str]] = [[]]
    filled = 0.0
    for name in sorted(sizes, key=lambda name: position[gradients.fetches[name]]):
        if filled >= share:
            stages.append([])
            filled = 0.0
        stages[-1].append(name)
        filled += sizes[name]
    return tuple(tuple(stage) for stage in stages[:-1])


def all_stages(early: Stages, names: Collection[str]) -> Stages:
    """The early stages, and what is not in them as the last one.

    Args: names: of all that is added up.
    """
    rest = tuple(sorted(set(names) - {name for stage in early for name in stage}))
    return (*early, rest) if rest else early
