"""A placement in words, as JSON, and as what a picture shows of it."""

from __future__ import annotations

from typing import Any

from millrace.graph.graph import Graph
from millrace.graph.places import Places
from millrace.graph.sizes import human_bytes
from millrace.place.placement import Placement, follow


def describe(placement: Placement) -> str:
    """A placement in words and tables."""
    problem, expected = placement.problem, placement.expected
    groups: dict[str, list[str]] = {name: [] for name in problem.device_names_D}
    for group, device in placement.device_of_group.items():
        groups[device].append(group)
    lines = [f"{1e3 * expected.step_s:.4g} ms a step expected: {placement.plan.note}", ""]
    width = max(map(len, groups))
    lines.append(f"{'device':{width}}  busy      memory         of  groups")
    for index, (device, names) in enumerate(groups.items()):
        peak, whole = (human_bytes(int(b[index])) for b in (expected.peak_bytes_D, problem.memory_bytes_D))
        share = _busy_share(placement, index)
        lines.append(f"{device:{width}}  {share:4.0%}  {peak:>10} {whole:>10}  {', '.join(names) or '-'}")
    lines += ["", f"over links, each step: {_sent(placement)}"]
    return "\n".join(lines)


def as_json(placement: Placement) -> dict[str, Any]:
    """A placement for programs."""
    problem, expected = placement.problem, placement.expected
    return {
        "step_s": expected.step_s,
        "algorithm": placement.plan.algorithm,
        "note": placement.plan.note,
        "devices": {
            device: {
                "busy_share": _busy_share(placement, index),
                "peak_bytes": float(expected.peak_bytes_D[index]),
                "sent_bytes": float(expected.bytes_DD[index].sum()),
            }
            for index, device in enumerate(problem.device_names_D)
        },
        "groups": placement.device_of_group,
    }


def places_of(placement: Placement, graph: Graph) -> Places:
    """The devices of a graph's nodes and variables, and what the legend of a picture says of each device.

    Args: graph: of the same step as the placement's. Before its batch is divided it is easier to read than after.
    """
    problem, expected = placement.problem, placement.expected
    like = follow(placement, graph)
    on = [problem.device_names_D[device] for device in like.plan.device_G]
    notes = {}
    for index, device in enumerate(problem.device_names_D):
        peak, whole = (human_bytes(int(b[index])) for b in (expected.peak_bytes_D, problem.memory_bytes_D))
        notes[device] = f"{_busy_share(placement, index):.0%} busy, {peak} of {whole}"
    parts = int(problem.microbatch_T.max(initial=0)) + 1
    total = human_bytes(int(expected.bytes_DD.sum()))
    divided = f" of {parts} microbatches" if parts > 1 else ""
    return Places(
        nodes={node.name: on[task.group] for task in like.grouping.tasks for node in task.nodes},
        variables={name: on[index] for name, index in like.grouping.variables.items()},
        notes=notes,
        summary=f"expected: {1e3 * expected.step_s:.3g} ms a step{divided}, {total} between devices",
    )


def _busy_share(placement: Placement, device: int) -> float:
    expected = placement.expected
    return float(expected.busy_s_D[device] / expected.step_s) if expected.step_s else 0.0


def _sent(placement: Placement) -> str:
    names, bytes_DD = placement.problem.device_names_D, placement.expected.bytes_DD
    pairs = [
        f"{names[s]} to {names[t]}: {human_bytes(int(bytes_DD[s, t]))}"
        for s in range(len(names))
        for t in range(len(names))
        if bytes_DD[s, t]
    ]
    return "; ".join(pairs) or "nothing"
