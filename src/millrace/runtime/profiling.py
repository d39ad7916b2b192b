"""Measuring the nodes of a graph on the workers that are to run it."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.graph.graph import Graph
from millrace.graph.save import save_graph
from millrace.place.cluster import Device
from millrace.place.profile import Profile, Seconds
from millrace.runtime.messages import Message
from millrace.runtime.workers import Workers

BUDGET_S = 3.0  # for one round of measuring
_GRACE_S = 60.0  # for loading the graph, and for the last node


def profile_on(
    workers: Workers, devices: Sequence[Device], graph: Graph, *, fused: bool, budget_s: float = BUDGET_S
) -> Profile:
    """How long the nodes of a graph take on each CPU worker, alone and while all others work.

    Workers that are alike are measured alone only once. A GPU keeps to its rates: it is told of nodes ahead of time, so
    that the time of a single one says little. Args: fused: whether the devices run compiled code.

    Raises: WorkerError when a worker does not answer.
    """
    devices = [device for device in devices if device.kind == "cpu"]
    if not devices:
        return Profile()
    path = workers.directory / "to-measure.graph"
    save_graph(graph, path)
    message = Message("measure", {"path": str(path), "fused": fused, "budget_s": budget_s})

    def measured(names: Sequence[str]) -> dict[str, Seconds]:
        answers = workers.ask(dict.fromkeys(names, message), budget_s + _GRACE_S)
        return {name: answer.fields["seconds"] for name, answer in answers.items()}

    busy = measured([device.name for device in devices])
    if len(devices) == 1:
        return Profile(busy, busy)
    first: dict[tuple[str, int, str], str] = {}
    for device in devices:
        first.setdefault((device.kind, device.threads, device.host), device.name)
    of_kind = {kind: measured([name])[name] for kind, name in first.items()}
    return Profile({d.name: of_kind[d.kind, d.threads, d.host] for d in devices}, busy)
