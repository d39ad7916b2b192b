"""What a picture of a graph shows: boxes, the arrows between them, and the row and block that each box stands in.

The forward part stands in one block, top to bottom; the backward part beside it, bottom to top, each module in the row
of its forward box; the update beside that.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph, feed_key, info
from millrace.graph.picture.arrows import arrows, sent_variables
from millrace.graph.picture.contract import contract
from millrace.graph.picture.layout import Edge, ranks
from millrace.graph.places import Places, short_names
from millrace.graph.scopes import SHARED, cut, fitting_depth, scope_of
from millrace.graph.signature import Phase, short_dtype
from millrace.graph.sizes import human_bytes, new_bytes, value_bytes
from millrace.graph.text import operator_label

Colour = Literal["phase", "device", "dtype"]
FEED, FETCH, VARIABLE = "feed", "fetch", "variable"
_BLOCKS = {Phase.FORWARD: 0, Phase.BACKWARD: 1, Phase.UPDATE: 2}
_MODULES = 40  # as many modules are shown, in as much depth as that permits
_TERMINALS = 8  # more feeds, fetches or variables than these become one box


@dataclass(frozen=True)
class Box:
    """One box. kind: a phase, "feed", "fetch" or "variable". colour: what its colour stands for. details: shown on
    hovering. device: that it is placed on, where the graph is placed."""

    title: str
    lines: tuple[str, ...]
    kind: str
    scope: str
    colour: str
    details: str = ""
    block: int = 0
    rank: int = 0
    device: str = ""


@dataclass(frozen=True)
class Picture:
    """Boxes, and arrows between them by box numbers with the bytes that they carry. note: what had to be left out.

    devices: of a placed graph, each with a few words about it. summary: of the placement.
    """

    title: str
    boxes: tuple[Box, ...]
    arrows: Mapping[Edge, int]
    by_module: bool
    note: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""

    def crosses(self, edge: Edge) -> bool:
        """Whether an arrow leads from one device to another."""
        source, target = (self.boxes[number].device for number in edge)
        return bool(source and target and source != target)


def module_picture(graph: Graph, colour: Colour, places: Places | None = None) -> Picture:
    """A box per module and phase, and device where the graph is placed."""
    depth = fitting_depth((info(n).scope for n in graph.nodes), _MODULES)
    where = places.nodes if places else {}
    keys = {n: (info(n).phase, cut(scope_of(n), depth), where.get(n.name, "")) for n in graph.nodes}
    groups = contract(graph.nodes, keys.__getitem__)
    boxes = [_module_box(*keys[group[0]][:2], group, colour) for group in groups]
    drawn = _assemble(graph, groups, boxes, colour, places, by_module=True)
    return replace(drawn, boxes=_in_rows_of_modules(drawn))


def node_picture(graph: Graph, colour: Colour, places: Places | None = None) -> Picture:
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
    drawn = _assemble(graph, list(groups.values()), boxes, colour, places, by_module=False)
    return replace(drawn, boxes=_in_rows_of_nodes(drawn))


def _module_box(phase: Phase, scope: str, nodes: Sequence[Node], colour: Colour) -> Box:
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
    graph: Graph,
    groups: Sequence[Sequence[Node]],
    boxes: Sequence[Box],
    colour: Colour,
    places: Places | None,
    *,
    by_module: bool,
) -> Picture:
    """Feeds, variables that go to other devices, the given boxes and fetches, with the arrows between them."""
    inputs = graph.placeholders()
    names = {node: name for name, node in inputs.items()}
    feeds = [inputs[feed_key(f.name)] for f in graph.feeds]
    fetched = {name: graph.node(node) for name, node in graph.fetches.items()}
    # A training graph can hand out every gradient; arrows to all of them would hide the rest.
    forward = {name: node for name, node in fetched.items() if info(node).phase is Phase.FORWARD}
    fetched = forward or fetched
    short = short_names([*places.nodes.values(), *places.variables.values()]) if places else {}
    box_of: dict[Node, int] = {}
    every: list[Box] = []

    def add(found: Sequence[Box], nodes: Sequence[Node]) -> None:
        box_of.update({node: len(every) + min(n, len(found) - 1) for n, node in enumerate(nodes)})
        every.extend(found)

    add(_terminal(FEED, [names[f] for f in feeds], feeds, colour, placed=places is not None), feeds)
    for device, sent in (sent_variables(graph, places) if places else {}).items():
        found = _terminal(VARIABLE, [names[v] for v in sent], sent, colour, placed=True)
        add([_on(box, device, short) for box in found], sent)
    for box, group in zip(boxes, groups, strict=True):
        device = places.nodes.get(group[0].name, "") if places else ""
        box_of.update(dict.fromkeys(group, len(every)))
        every.append(_on(box, device, short) if device else box)
    handed = list(fetched.values())
    ends = _terminal(FETCH, list(fetched), handed, colour, placed=places is not None)
    numbers = [len(every) + min(n, len(ends) - 1) for n in range(len(handed))]
    drawn = arrows(graph, box_of, list(zip(handed, numbers, strict=True)), places)
    return Picture(
        _title(graph),
        (*every, *ends),
        drawn,
        by_module,
        devices=places.notes if places else {},
        summary=places.summary if places else "",
    )


def _on(box: Box, device: str, short: Mapping[str, str]) -> Box:
    """A box with its device, which is also written there: colours alone are for those who see them."""
    *lines, last = box.lines or ("",)
    shown = " · ".join(filter(None, [last, short[device]]))
    return replace(box, device=device, colour=device, lines=(*lines, shown))


def _title(graph: Graph) -> str:
    counts = Counter(info(n).phase for n in graph.nodes)
    phases = ", ".join(f"{counts[p]} {p}" for p in Phase if counts[p])
    held = human_bytes(sum(v.spec.size_bytes for v in graph.variables))
    return f"{len(graph.nodes)} nodes: {phases} · {len(graph.variables)} variables, {held}"


def _terminal(kind: str, names: Sequence[str], nodes: Sequence[Node], colour: Colour, *, placed: bool) -> list[Box]:
    """A box for every feed, fetch or variable, or one for all when there are many."""
    if len(names) > _TERMINALS:
        return [Box(f"{len(names)} {kind}{'es' if kind == FETCH else 's'}", (), kind, "", kind, "\n".join(names))]
    colours = [kind if placed or colour == "phase" else _colour([node], colour) for node in nodes]
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
    shown = {n for n, box in enumerate(picture.boxes) if box.kind in (Phase.FORWARD, FEED, FETCH, VARIABLE)}
    return ranks(len(picture.boxes), [e for e in picture.arrows if shown.issuperset(e)])


def _placed(picture: Picture, rank: list[int]) -> tuple[Box, ...]:
    """The boxes with their ranks; a fetch stands below the box that makes it."""
    block = [box.block for box in picture.boxes]
    for source, target in picture.arrows:
        if picture.boxes[target].kind == FETCH and block[source]:
            block[target], rank[target] = block[source], rank[source] + 1
    return tuple(replace(box, rank=r, block=b) for box, r, b in zip(picture.boxes, rank, block, strict=True))
