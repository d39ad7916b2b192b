"""What a picture of a graph shows: boxes, the arrows between them, and the row and block that each box stands in.

The forward part stands in one block, top to bottom; the backward part beside it, bottom to top, each module in the row
of its forward box; the update beside that.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph, feed_key, info
from millrace.graph.picture.contract import contract
from millrace.graph.picture.layout import Edge, ranks
from millrace.graph.scopes import SHARED, cut, fitting_depth, scope_of
from millrace.graph.signature import Phase, short_dtype
from millrace.graph.sizes import human_bytes, new_bytes, value_bytes
from millrace.graph.text import operator_label

Colour = Literal["phase", "device", "dtype"]
FEED, FETCH = "feed", "fetch"
_BLOCKS = {Phase.FORWARD: 0, Phase.BACKWARD: 1, Phase.UPDATE: 2}
_MODULES = 40  # as many modules are shown, in as much depth as that permits
_TERMINALS = 8  # more feeds or fetches than these become one box


@dataclass(frozen=True)
class Box:
    """One box. kind: a phase, "feed" or "fetch". colour: what its colour stands for. details: shown on hovering."""

    title: str
    lines: tuple[str, ...]
    kind: str
    scope: str
    colour: str
    details: str = ""
    block: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Picture:
    """Boxes, and arrows between them by box numbers with the bytes that they carry. note: what had to be left out."""

    title: str
    boxes: tuple[Box, ...]
    arrows: Mapping[Edge, int]
    by_module: bool
    note: str = ""


def module_picture(graph: Graph, colour: Colour) -> Picture:
    """A box per module and phase."""
    depth = fitting_depth((info(n).scope for n in graph.nodes), _MODULES)
    keys = {n: (info(n).phase, cut(scope_of(n), depth)) for n in graph.nodes}
    groups = contract(graph.nodes, keys.__getitem__)
    boxes = [_module_box(keys[group[0]], group, colour) for group in groups]
    drawn = _assemble(graph, groups, boxes, colour, by_module=True)
    return replace(drawn, boxes=_in_rows_of_modules(drawn))


def node_picture(graph: Graph, colour: Colour) -> Picture:
    """A box per node; the parts of a tuple belong to the node that makes it."""
    groups: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        whole = node
        while whole.target is operator.getitem and isinstance(whole.args[0], Node):
            whole = whole.args[0]
        groups.setdefault(whole, []).append(node)
    updated = {node: variable for variable, node in graph.updates.items()}
    inputs = {node: name for name, node in graph.placeholders().items()}
    boxes = [_node_box(node, parts, updated, inputs, colour) for node, parts in groups.items()]
    drawn = _assemble(graph, list(groups.values()), boxes, colour, by_module=False)
    return replace(drawn, boxes=_in_rows_of_nodes(drawn))


def _module_box(key: tuple[Phase, str], nodes: Sequence[Node], colour: Colour) -> Box:
    phase, scope = key
    biggest = sorted((n for n in nodes if new_bytes(n)), key=new_bytes, reverse=True)
    names = Counter(_plain(n) for n in biggest)
    shown = list(names)[:3] or [_plain(nodes[0])]
    plural = "" if len(nodes) == 1 else "s"
    return Box(
        title={"": "(step)", SHARED: "(shared)"}.get(scope, scope),
        lines=(", ".join(shown), f"{len(nodes)} node{plural}, {human_bytes(sum(map(new_bytes, nodes)))}"),
        kind=str(phase),
        scope=scope,
        colour=_colour(nodes, colour),
        details="\n".join(f"{name}: {count}" for name, count in Counter(_plain(n) for n in nodes).items()),
        block=_BLOCKS[phase],
    )


def _node_box(
    node: Node, parts: Sequence[Node], updated: Mapping[str, str], inputs: Mapping[Node, str], colour: Colour
) -> Box:
    phase = info(node).phase
    results = [updated[p.name] for p in parts if p.name in updated]
    read = [inputs[i] for i in node.all_input_nodes if i in inputs and not inputs[i].startswith(feed_key(""))]
    lines = [", ".join(_spec(v) for v in _leaves(node.meta.get("val")))]
    lines += [f"reads {', '.join(read)}"] if read else []
    lines += [f"→ {', '.join(results)}"] if results else []
    return Box(
        title=_plain(node),
        lines=tuple(lines),
        kind=str(phase),
        scope=scope_of(node),
        colour=_colour(parts, colour),
        details=f"%{node.name} in {info(node).scope or 'the step'}\n{info(node).line}".strip(),
        block=_BLOCKS[phase],
    )


def _plain(node: Node) -> str:
    return operator_label(node.target).split(".")[-1 if "millrace" in str(node.target) else 0].strip("_")


def _leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple | list) else []


def _spec(tensor: Tensor) -> str:
    return f"{short_dtype(tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"


def _colour(nodes: Sequence[Node], colour: Colour) -> str:
    """What most bytes of the nodes' results have in common."""
    if colour == "phase":
        return str(info(nodes[0]).phase)
    weights: Counter[str] = Counter()
    for tensor in (leaf for node in nodes for leaf in _leaves(node.meta.get("val"))):
        name = str(tensor.device) if colour == "device" else short_dtype(tensor.dtype)
        weights[name] += value_bytes(tensor) + 1
    return weights.most_common(1)[0][0] if weights else "none"


def _assemble(
    graph: Graph, groups: Sequence[Sequence[Node]], boxes: Sequence[Box], colour: Colour, *, by_module: bool
) -> Picture:
    """Feeds, the given boxes and fetches, with the arrows between them."""
    placeholders = graph.placeholders()
    feeds = [placeholders[feed_key(f.name)] for f in graph.feeds]
    fetched = {name: graph.node(node) for name, node in graph.fetches.items()}
    # A training graph can hand out every gradient; arrows to all of them would hide the rest.
    forward = {name: node for name, node in fetched.items() if info(node).phase is Phase.FORWARD}
    fetched = forward or fetched
    every = [_terminal(FEED, [feed_key(f.name) for f in graph.feeds], feeds, colour), list(boxes)]
    every.append(_terminal(FETCH, list(fetched), list(fetched.values()), colour))
    box_of = {node: len(every[0]) + number for number, group in enumerate(groups) for node in group}
    box_of |= {node: min(number, len(every[0]) - 1) for number, node in enumerate(feeds)}
    carried: dict[Edge, dict[Node, int]] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source in box_of and box_of[source] != box_of[node]:
                carried.setdefault((box_of[source], box_of[node]), {})[source] = value_bytes(source.meta.get("val"))
    first = len(every[0]) + len(boxes)
    for number, node in enumerate(fetched.values()):
        if node in box_of:
            target = min(first + number, first + len(every[2]) - 1)
            carried.setdefault((box_of[node], target), {})[node] = value_bytes(node.meta.get("val"))
    counts = Counter(info(n).phase for n in graph.nodes)
    phases = ", ".join(f"{counts[p]} {p}" for p in Phase if counts[p])
    held = human_bytes(sum(v.spec.size_bytes for v in graph.variables))
    title = f"{len(graph.nodes)} nodes: {phases} · {len(graph.variables)} variables, {held}"
    arrows = {edge: sum(sizes.values()) for edge, sizes in carried.items()}
    return Picture(title, tuple(box for part in every for box in part), arrows, by_module)


def _terminal(kind: str, names: Sequence[str], nodes: Sequence[Node], colour: Colour) -> list[Box]:
    """A box for every feed or fetch, or one for all when there are many."""
    if len(names) > _TERMINALS:
        return [Box(f"{len(names)} {kind}{'es' if kind == FETCH else 's'}", (), kind, "", kind, "\n".join(names))]
    colours = [kind if colour == "phase" else _colour([node], colour) for node in nodes]
    specs = [", ".join(_spec(v) for v in _leaves(node.meta.get("val"))) for node in nodes]
    return [Box(name, (spec,), kind, "", tint) for name, spec, tint in zip(names, specs, colours, strict=True)]


def _in_rows_of_modules(picture: Picture) -> tuple[Box, ...]:
    """Forward boxes by the longest path; backward and update boxes in the row of their module's forward box.

    Where a module has several forward boxes, a backward box stands beside one that it keeps something of, or else
    beside the lowest above the backward boxes that it continues.
    """
    rank = _forward_ranks(picture)
    rows: dict[str, list[int]] = {}
    for number, box in enumerate(picture.boxes):
        if box.kind == Phase.FORWARD:
            rows.setdefault(box.scope, []).append(rank[number])
    below = max(rank, default=0) + 1
    for number, box in enumerate(picture.boxes):
        if box.kind == Phase.BACKWARD:
            sources = [(a, picture.boxes[a]) for a, b in picture.arrows if b == number]
            kept = [rank[a] for a, source in sources if source.kind == Phase.FORWARD and source.scope == box.scope]
            limit = min((rank[a] for a, source in sources if source.kind == Phase.BACKWARD), default=below)
            own = rows.get(box.scope, [max(limit - 1, 0)])
            rank[number] = max(kept or [row for row in own if row < limit] or [min(own)])
        elif box.kind == Phase.UPDATE:
            rank[number] = 0 if box.scope == SHARED else _row_of_module(box.scope, rows)
    return _placed(picture, rank)


def _row_of_module(scope: str, rows: Mapping[str, Sequence[int]]) -> int:
    """The first row of the module, or else of its parent or what is inside it, or else the top."""
    inside = [min(found) for name, found in rows.items() if name.startswith(f"{scope}.")]
    while scope and scope not in rows and not inside:
        scope = scope.rpartition(".")[0]
    return min(rows[scope]) if scope in rows else min(inside, default=0)


def _in_rows_of_nodes(picture: Picture) -> tuple[Box, ...]:
    """Every phase by its own longest path; the backward part upwards from the forward part's last row."""
    rank = _forward_ranks(picture)
    bottom = max(rank, default=0)
    for kind, sign, start in ((Phase.BACKWARD, -1, bottom), (Phase.UPDATE, 1, 0)):
        members = [n for n, box in enumerate(picture.boxes) if box.kind == kind]
        number = {n: i for i, n in enumerate(members)}
        inside = [(number[a], number[b]) for a, b in picture.arrows if a in number and b in number]
        for n, own in zip(members, ranks(len(members), inside), strict=True):
            rank[n] = start + sign * own
    top = min(rank, default=0)
    return _placed(picture, [r - top for r in rank])


def _forward_ranks(picture: Picture) -> list[int]:
    shown = {n for n, box in enumerate(picture.boxes) if box.kind in (Phase.FORWARD, FEED, FETCH)}
    return ranks(len(picture.boxes), [e for e in picture.arrows if shown.issuperset(e)])


def _placed(picture: Picture, rank: list[int]) -> tuple[Box, ...]:
    """The boxes with their ranks; a fetch stands below the box that makes it."""
    block = [box.block for box in picture.boxes]
    for source, target in picture.arrows:
        if picture.boxes[target].kind == FETCH and block[source]:
            block[target], rank[target] = block[source], rank[source] + 1
    return tuple(replace(box, rank=r, block=b) for box, r, b in zip(picture.boxes, rank, block, strict=True))
