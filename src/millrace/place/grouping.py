"""Nodes put together before a placement is searched: groups that are placed as one, and tasks that run as one.

A group is a module, or a block of a split layer: its forward, backward and update nodes and its variables. The heaviest
groups are divided into their submodules until there are as many groups as may be. A task is the part of a group that
belongs to one phase, one microbatch and one chunk of time. Of the backward pass, what no other group waits for (the
gradients of variables) is a task of its own, which can fill the time in which a device would wait. Where a task would
have to run before and after another one, it is divided.

Source of the two tasks of a backward pass: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", 2023.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from millrace.graph.graph import Graph, info
from millrace.graph.passes.chunking.builder import CHUNK
from millrace.graph.passes.microbatch import MICROBATCH
from millrace.graph.scopes import cut
from millrace.graph.signature import Phase
from millrace.place.paths import counted_to

_NO_CHUNK = -1


@dataclass(frozen=True)
class Task:
    """Nodes that run in one go, in the order of the graph."""

    name: str
    group: int
    phase: Phase
    microbatch: int
    nodes: tuple[Node, ...]


_TaskKey = tuple[int, Phase, int, int, bool]  # group, phase, microbatch, chunk, whether nothing else waits for it
Key = tuple[str, str]  # what decides the group of a node: its module and its label


@dataclass(frozen=True)
class Grouping:
    """groups: their names. tasks: in an order in which they can run. variables: the group of every variable.

    named: the group's name for every module and label of the graph, so that another graph of the same step (for other
    fetches, or another batch) can be grouped alike.
    """

    groups: tuple[str, ...]
    tasks: tuple[Task, ...]
    variables: Mapping[str, int]
    named: Mapping[Key, str]


def group(
    graph: Graph,
    weight: Callable[[Node], float],
    label: Callable[[Node, str], str] = lambda *_: "",
    *,
    limit: int = 40,
    like: Grouping | None = None,
) -> Grouping:
    """The groups and tasks of a graph.

    Args:
        weight: what a node counts for when the heaviest group is looked for.
        label: of a node in a module; nodes of one module with different labels are in different groups. A label that
            does not begin with a space is the name of a group, whatever its modules are.
        limit: how many groups there may be, where labels and modules on the top do not make more.
        like: the grouping of another graph of the same step, whose groups these are to be, in their order; others come
            after them, for labels that it has not.
    """
    paths = {node: path for node, (path, _) in counted_to(graph).items()}
    keys = {node: (paths[_producer(node)], label(_producer(node), paths[_producer(node)])) for node in graph.nodes}
    if like is None:
        weights: dict[str, float] = {}
        for node, (path, _) in keys.items():
            weights[path] = weights.get(path, 0.0) + weight(node)
        modules = _divided(weights, limit)
        named = {(path, tag): tag if tag[:1].strip() else modules[path] + tag for path, tag in keys.values()}
        groups = tuple(dict.fromkeys(named[key] for key in keys.values()))
    else:
        named = {key: _nearest(like, key) for key in keys.values()}
        groups = tuple(dict.fromkeys([*like.groups, *named.values()]))
    index = {name: number for number, name in enumerate(groups)}
    group_of = {node: index[named[key]] for node, key in keys.items()}
    return Grouping(groups, _tasks(graph, group_of, groups), _homes(graph, group_of), named)


def _nearest(like: Grouping, key: Key) -> str:
    """The group that a module would have been in: that of the longest path that they share; a new one for a label that
    is not known, since something is wished of it."""
    path, label = key
    while (path, label) not in like.named and path:
        path = path.rpartition(".")[0]
    found = like.named.get((path, label))
    if found is None and label:
        return label if label[:1].strip() else key[0] + label
    return found or next((name for (other, _), name in like.named.items() if other == key[0]), like.groups[0])


def _homes(graph: Graph, group_of: Mapping[Node, int]) -> dict[str, int]:
    """The group of every variable that is read or updated."""
    homes, by_name = {}, {node.name: node for node in graph.fx.nodes}
    for variable, node in zip(graph.variables, graph.fx.nodes, strict=False):
        new = by_name[graph.updates[variable.name]] if variable.name in graph.updates else node
        makers = [n for n in (new, *node.users) if n in group_of]
        if makers:
            homes[variable.name] = group_of[makers[0]]
    return homes


def _divided(weights: Mapping[str, float], limit: int) -> dict[str, str]:
    """The group of every module path: the heaviest is divided as long as there may be more."""
    depth = dict.fromkeys(weights, 1)
    fixed: set[str] = set()
    while True:
        groups: dict[str, list[str]] = {}
        for path in depth:
            groups.setdefault(cut(path, depth[path]), []).append(path)
        undecided = [name for name in groups if name not in fixed]
        if not undecided:
            return {path: cut(path, depth[path]) for path in depth}
        heaviest = max(undecided, key=lambda name: (sum(weights[path] for path in groups[name]), name))
        parts = {cut(path, depth[path] + 1) for path in groups[heaviest]}
        if len(groups) + len(parts) - 1 > limit or parts == {heaviest}:
            fixed.add(heaviest)
        else:
            for path in groups[heaviest]:
                depth[path] += 1


def _tasks(graph: Graph, group_of: Mapping[Node, int], names: Sequence[str]) -> tuple[Task, ...]:
    """Nodes joined to tasks so that no two tasks wait for each other."""
    members: list[list[Node]] = []
    keys: list[_TaskKey] = []
    ancestors: list[int] = []  # bit sets of tasks
    newest: dict[_TaskKey, int] = {}
    leading_on = _leading_on(group_of)
    task_of: dict[Node, int] = {}
    for node in group_of:
        if node.target is operator.getitem:
            task = task_of[_producer(node)]
            members[task].append(node)
            task_of[node] = task
            continue
        phase = info(node).phase
        is_last = phase is Phase.BACKWARD and node not in leading_on
        key = (group_of[node], phase, node.meta.get(MICROBATCH, 0), node.meta.get(CHUNK, _NO_CHUNK), is_last)
        before = {task_of[a] for a in node.all_input_nodes if a in task_of}
        needed = 0
        for other in before:
            needed |= ancestors[other] | (1 << other)
        task = newest.get(key, -1)
        # Joining is refused where something that the node reads itself waits for the task.
        if task < 0 or any(ancestors[other] >> task & 1 for other in before if other != task):
            task = newest[key] = len(members)
            members.append([])
            keys.append(key)
            ancestors.append(0)
        needed &= ~(1 << task)
        if needed & ~ancestors[task]:
            ancestors[task] |= needed
            for other in range(len(ancestors)):
                if ancestors[other] >> task & 1:
                    ancestors[other] |= needed
        members[task].append(node)
        task_of[node] = task
    order = _sorted(members, task_of)
    counts: dict[str, int] = {}
    tasks = []
    for index in order:
        group_index, phase, part, chunk, is_last = keys[index]
        name = f"{names[group_index]} {'gradients' if is_last else phase}"
        name += f" {part}" if phase is not Phase.UPDATE else ""
        name += f" chunk {chunk}" if chunk != _NO_CHUNK else ""
        counts[name] = counts.get(name, 0) + 1
        suffix = f" ({counts[name]})" if counts[name] > 1 else ""
        tasks.append(Task(name + suffix, group_index, phase, part, tuple(members[index])))
    return tuple(tasks)


def _leading_on(group_of: Mapping[Node, int]) -> set[Node]:
    """The nodes that another group waits for before the update."""
    found: set[Node] = set()
    for node in reversed(list(group_of)):
        users = (user for user in node.users if user in group_of and info(user).phase is not Phase.UPDATE)
        if any(user in found or group_of[user] != group_of[node] for user in users):
            found.add(node)
    return found


def _sorted(members: list[list[Node]], task_of: Mapping[Node, int]) -> list[int]:
    """The tasks in an order in which they can run; among those that can, the one whose nodes come first."""
    waiting = [
        {task_of[a] for node in nodes for a in node.all_input_nodes if a in task_of} - {index}
        for index, nodes in enumerate(members)
    ]
    users: list[list[int]] = [[] for _ in members]
    for index, others in enumerate(waiting):
        for other in others:
            users[other].append(index)
    left = [len(others) for others in waiting]
    ready = [index for index, count in enumerate(left) if not count]
    order = []
    heapq.heapify(ready)
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            left[user] -= 1
            if not left[user]:
                heapq.heappush(ready, user)
    assert len(order) == len(members), "tasks wait for each other"
    return order


def _producer(node: Node) -> Node:
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node
