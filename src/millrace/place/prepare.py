"""A graph as problems of placing it: one way to group its nodes, or several to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from millrace.errors import PlacementError
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase
from millrace.place.algorithms.registry import algorithm
from millrace.place.cluster import Cluster
from millrace.place.cost import tensor_bytes, works_of
from millrace.place.demands import Demands, allowed_devices
from millrace.place.describe import describe
from millrace.place.grouping import Grouping, group
from millrace.place.paths import STEP
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.wire import Wire


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an algorithm is given, and the groups that it speaks of. states_apart: see `prepare`."""

    grouping: Grouping
    problem: Problem
    states_apart: bool


def prepare(
    graph: Graph,
    cluster: Cluster,
    demands: Demands,
    wire: Wire,
    *,
    fused: bool = True,
    limit: int = 40,
    states_apart: bool = False,
) -> Prepared:
    """Group the nodes of a graph, and describe the problem of placing them.

    Args: as for `placement.place`. states_apart: whether the variables of a module, with their
        updates, are a group of their own. They can then live where there is memory, and their values travel to where
        they are computed with (as in Ren et al. 2021, "ZeRO-Offload").
    """
    grouping = group(graph, _weight, _labels(demands, states_apart), limit=limit)
    allowed = allowed_devices(grouping, cluster, demands)
    problem = describe(graph, grouping, cluster, allowed, wire, fused=fused)
    return Prepared(grouping, problem, states_apart)


def group_like(graph: Graph, demands: Demands, like: Grouping, *, states_apart: bool) -> Grouping:
    """The groups of another graph of the same step: for other fetches, or a batch of another size."""
    return group(graph, _weight, _labels(demands, states_apart), like=like)


def best_plan(ways: Sequence[Prepared], search: str, *, budget_s: float, seed: int) -> tuple[Prepared, Plan]:
    """The fastest plan for any of several ways to group a graph, each searched in its part of the time.

    Raises: PlacementError when there is no plan for any.
    """
    found: list[tuple[float, int, Plan]] = []
    refusals: list[PlacementError] = []
    for number, way in enumerate(ways):
        try:
            plan = algorithm(search)(way.problem, budget_s=budget_s / len(ways), seed=seed)
            found.append((simulate(way.problem, plan).step_s, number, plan))
        except PlacementError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    _, number, plan = min(found, key=lambda f: f[:2])
    return ways[number], plan


def _labels(demands: Demands, states_apart: bool) -> Callable[[Node, str], str]:
    """What `group` asks of every node."""

    def label(node: Node, path: str) -> str:
        found = demands.label(node, path)
        apart = states_apart and path != STEP and info(node).phase is Phase.UPDATE and not found[:1].strip()
        return f"{found} state" if apart else found

    return label


def _weight(node: Node) -> float:
    """Operations, and bytes as what could be computed meanwhile."""
    return sum(work.flops + 10.0 * work.moved_bytes for work in works_of([node], fused=False)) + tensor_bytes(
        node.meta.get("val")
    )
