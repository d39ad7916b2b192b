"""A grouped graph and a cluster as the arrays that placement algorithms work on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch.fx import Node

from millrace.graph.graph import Graph, spec_of
from millrace.graph.signature import Phase
from millrace.graph.values import is_cheap, reads_of
from millrace.place.cluster import Cluster, Device
from millrace.place.cost import Work, is_free, tensor_bytes, works_of
from millrace.place.grouping import Grouping, Task
from millrace.place.problem import Problem
from millrace.place.wire import Wire, expected_bytes

_USABLE = 0.9  # of a device's memory: allocators waste some, and transfers and libraries take some


def describe(
    graph: Graph,
    grouping: Grouping,
    cluster: Cluster,
    allowed_GD: np.ndarray,
    wire: Wire,
    *,
    fused: bool,
) -> Problem:
    """The placement problem.

    Variables that are read outside of their group are tensors, made at the start of the step by a task of their own.

    Args: allowed_GD: whether a group may be on a device. wire: what is narrowed between devices; the time to encode and
    decode it is not counted. fused: see `cost.works_of`.
    """
    groups, devices = len(grouping.groups), cluster.devices
    inputs, by_name = graph.placeholders(), {node.name: node for node in graph.fx.nodes}
    home = {inputs[name]: index for name, index in grouping.variables.items()}
    reads = [reads_of(task.nodes) for task in grouping.tasks]
    given = _given(home, grouping.tasks, reads)
    tasks = [Task(f"{grouping.groups[g]} variables", g, Phase.FORWARD, 0, tuple(nodes)) for g, nodes in given.items()]
    first = len(tasks)
    tasks += grouping.tasks
    made_by = {node: index for index, task in enumerate(tasks) for node in task.nodes}
    users: dict[Node, list[int]] = {}
    for index, needed in enumerate(reads, start=first):
        for node in needed:
            if node in made_by:
                users.setdefault(node, []).append(index)
    tensors = _together(users, made_by, tasks)
    # New values are written where the old ones lie.
    in_memory = {*users, *map(by_name.__getitem__, graph.updates.values())}
    codecs = wire.codecs(graph)
    works_T = [works_of(task.nodes, fused=fused) if index >= first else [] for index, task in enumerate(tasks)]
    hosts = list(dict.fromkeys(device.host for device in devices))
    shared_D = [sum(other.host == device.host for other in devices) > 1 for device in devices]
    seconds_TD = _seconds(works_T, tasks, devices, shared_D, allowed_GD)
    alone_s_TD = seconds_TD
    if any(device.busy_rates for device in devices):
        alone_s_TD = _seconds(works_T, tasks, devices, [False] * len(devices), allowed_GD)
    flops_G, resident_G = np.zeros(groups), np.zeros(groups)
    for task, works in zip(tasks, works_T, strict=True):
        flops_G[task.group] += sum(work.flops for work in works)
    for variable in graph.variables:
        if variable.name in grouping.variables:
            resident_G[grouping.variables[variable.name]] += variable.spec.size_bytes
    latency_DD, rate_DD, wire_DD = _links(cluster)
    return Problem(
        group_names_G=grouping.groups,
        flops_G=flops_G,
        resident_bytes_G=resident_G,
        pipeline_G=_pipeline(grouping),
        task_names_T=tuple(task.name for task in tasks),
        group_T=np.array([task.group for task in tasks], dtype=np.int64),
        microbatch_T=np.array([task.microbatch for task in tasks], dtype=np.int64),
        backward_T=np.array([task.phase is Phase.BACKWARD for task in tasks]),
        scratch_bytes_T=np.array([0.0] * first + [_scratch(task.nodes, in_memory) for task in tasks[first:]]),
        seconds_TD=seconds_TD,
        producer_K=np.array([made_by[nodes[0]] for nodes in tensors], dtype=np.int64),
        bytes_K=np.array([sum(tensor_bytes(node.meta.get("val")) for node in nodes) for nodes in tensors], dtype=float),
        wire_bytes_K=np.array([sum(_wire_bytes(node, codecs.get(node.name)) for node in nodes) for nodes in tensors]),
        first_use_K1=np.cumsum([0, *(len(users[nodes[0]]) for nodes in tensors)], dtype=np.int64),
        uses_C=np.array([index for nodes in tensors for index in users[nodes[0]]], dtype=np.int64),
        device_names_D=tuple(device.name for device in devices),
        memory_bytes_D=np.array([_USABLE * device.memory_bytes for device in devices]),
        latency_s_DD=latency_DD,
        bytes_per_s_DD=rate_DD,
        wire_DD=wire_DD,
        alone_s_TD=None if np.array_equal(alone_s_TD, seconds_TD) else np.minimum(alone_s_TD, seconds_TD),
        host_D=np.array([hosts.index(device.host) for device in devices], dtype=np.int64),
    )


def _seconds(
    works_T: Sequence[Sequence[Work]],
    tasks: Sequence[Task],
    devices: Sequence[Device],
    among_others_D: Sequence[bool],
    allowed_GD: np.ndarray,
) -> np.ndarray:
    """[T, D]"""
    paces = [d.among_others() if among else d for d, among in zip(devices, among_others_D, strict=True)]
    seconds_TD = np.full((len(tasks), len(devices)), np.inf)
    for index, (task, works) in enumerate(zip(tasks, works_T, strict=True)):
        for d, device in enumerate(paces):
            if allowed_GD[task.group, d]:
                seconds_TD[index, d] = sum(work.seconds(device) for work in works)
    return seconds_TD


def _together(
    users: Mapping[Node, list[int]], made_by: Mapping[Node, int], tasks: Sequence[Task]
) -> list[tuple[Node, ...]]:
    """The tensors: those that one task makes and the same tasks of its own group read count as one.

    They never travel, and take memory for the same time, so a step takes as long, and is simulated sooner.
    """
    found: dict[object, list[Node]] = {}
    for node, readers in users.items():
        group = tasks[made_by[node]].group
        stays = all(tasks[index].group == group for index in readers)
        found.setdefault((made_by[node], *readers) if stays else node, []).append(node)
    return [tuple(nodes) for nodes in found.values()]


def _given(
    home: Mapping[Node, int], tasks: Sequence[Task], reads: Sequence[Mapping[Node, None]]
) -> dict[int, list[Node]]:
    """The variables that other groups read, by their group."""
    given: dict[int, dict[Node, None]] = {}
    for task, needed in zip(tasks, reads, strict=True):
        for node in needed:
            if home.get(node, task.group) != task.group:
                given.setdefault(home[node], {})[node] = None
    return {group: list(nodes) for group, nodes in given.items()}


def _wire_bytes(node: Node, codec: str | None) -> float:
    spec = spec_of(node) if codec else None
    return float(expected_bytes(codec, spec)) if spec else tensor_bytes(node.meta.get("val"))


def _pipeline(grouping: Grouping) -> np.ndarray:
    """Where each group stands in the forward pass."""
    first = np.full(len(grouping.groups), len(grouping.tasks), dtype=np.int64)
    for index, task in enumerate(grouping.tasks):
        if task.phase is Phase.FORWARD:
            first[task.group] = min(first[task.group], index)
    position = np.empty_like(first)
    position[np.argsort(first, kind="stable")] = np.arange(len(first))
    return position


def _scratch(nodes: Sequence[Node], shared: Collection[Node]) -> float:
    """The most memory that values take which the task makes for itself alone, bytes. shared: counted elsewhere."""
    own = {node: tensor_bytes(node.meta.get("val")) for node in nodes if node not in shared and not is_free(node)}
    last: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        for source in _memory_of(node):
            last[source] = index
    held = peak = 0.0
    ending: dict[int, list[Node]] = {}
    for node in own:
        ending.setdefault(last.get(node, -1), []).append(node)
    for index, node in enumerate(nodes):
        held += own.get(node, 0.0)
        peak = max(peak, held)
        held -= sum(own[gone] for gone in ending.get(index, []))
    return peak


def _memory_of(node: Node) -> list[Node]:
    """The nodes in whose memory lie what `node` reads."""
    found, waiting = [], list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        found.append(source)
        if source.op == "call_function" and is_free(source) and not is_cheap(source):
            waiting += source.all_input_nodes
    return found


def _links(cluster: Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = len(cluster.devices)
    latency, rate = np.zeros((count, count)), np.full((count, count), np.inf)
    wire = np.full((count, count), -1, dtype=np.int64)
    wires: dict[object, int] = {}
    for s, source in enumerate(cluster.devices):
        for t, target in enumerate(cluster.devices):
            if s != t:
                link = cluster.link(source.name, target.name)
                latency[s, t], rate[s, t] = link.latency_s, link.bytes_per_s
                if link.sender_copies:
                    continue
                # A wire that pairs share is shared in both directions.
                key = cluster.links.index(link) if link.shared else (source.name, target.name)
                wire[s, t] = wires.setdefault(key, len(wires))
    return latency, rate, wire
