"""Many nodes as few: groups that depend on each other in one direction only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch.fx import Node


def contract(nodes: Sequence[Node], key: Callable[[Node], Hashable]) -> list[list[Node]]:
    """Group nodes of equal key so that no two groups depend on each other, in an order in which each stands after what
    it depends on.

    A node joins a group that one of its inputs is in, or else the latest, unless that would close a cycle: a module
    whose result comes back to it through another one becomes two groups.
    """
    group_of: dict[Node, int] = {}
    members: list[list[Node]] = []
    before: list[set[int]] = []  # every group that a group depends on, directly or not
    latest: dict[Hashable, list[int]] = {}
    for node in nodes:
        inputs = {group_of[i] for i in node.all_input_nodes if i in group_of}
        own = latest.setdefault(key(node), [])
        candidates = sorted((g for g in own if g in inputs), reverse=True) + own[::-1]
        chosen = next((g for g in candidates if not any(g in before[i] for i in inputs - {g})), None)
        if chosen is None:
            chosen = len(members)
            members.append([])
            before.append(set())
            own.append(chosen)
        new = set().union(inputs, *(before[i] for i in inputs)) - {chosen} - before[chosen]
        for group in range(len(members)) if new else ():
            if group == chosen or chosen in before[group]:
                before[group] |= new
        members[chosen].append(node)
        group_of[node] = chosen
    return [members[g] for g in sorted(range(len(members)), key=lambda g: (len(before[g]), g))]
