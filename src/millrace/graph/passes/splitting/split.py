"""Divide wide layers into blocks: their weights, their work forward and backward, and their update.

A layer with 2,000 neurons becomes 4 blocks of 500 that are ordinary nodes of the graph, so that a placement can put
them on devices of their own (Dean et al., "Large scale distributed deep networks", 2012, §3). Which variables are split
is decided first (`choose.py`); then every node is rewritten, in order. A value is whole or in blocks along one
dimension, and a rule for its operator says what that means for the result. Where no rule fits, blocks are joined and
the operator runs whole. So every graph can be split, and computes what it did up to rounding: sums over what is divided
are sums of partial sums.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from millrace.errors import GraphError
from millrace.graph.encoding import attribute
from millrace.graph.graph import Graph, set_output, step_module
from millrace.graph.passes.splitting.builder import Builder, fake_mode, fits
from millrace.graph.passes.splitting.choose import only_sliced, weights_to_split, with_slots
from millrace.graph.passes.splitting.elementwise import elementwise, is_elementwise
from millrace.graph.passes.splitting.rules import RULES
from millrace.graph.passes.splitting.values import Along, Several, Split, Value
from millrace.graph.passes.splitting.wishes import wishes
from millrace.graph.signature import Part, TensorSpec, Variable

MIN_WIDTH = 64  # outputs, channels or rows
_BLOCK = re.compile(r"(?P<whole>.*)\[(?P<before>(?::, )*)(?P<start>\d+):\d+\]")  # as `block_name` writes it


def split(graph: Graph, parts: int, *, min_width: int = MIN_WIDTH) -> Graph:
    """The graph with its wide layers in `parts` blocks.

    A weight is split along the dimension that makes the layer's outputs, if that is the outermost in memory, as it is
    for the modules of PyTorch. The variable "fc.weight" becomes "fc.weight[0:500]", "fc.weight[500:1000]", …, and its
    optimizer slots likewise; `Variable.part` says where each belongs, and `whole_variables` puts them together. Their
    `initial` values are views of the whole ones, so that a session trains the caller's own tensors. The fetches stay as
    they are. A step that is traced again is split again, alike.

    Args:
        parts: how many blocks; 1 leaves the graph as it is.
        min_width: layers with fewer outputs (channels, rows of a table) stay whole.

    Returns: the split graph, which is the given one where nothing is wide enough.

    Raises: GraphError for fewer than one part, and for a graph that has been split before.
    """
    if parts < 1 or min_width < 1:
        raise GraphError(f"split needs at least one part and a width of at least 1; got {parts=}, {min_width=}")
    if any(v.part is not None for v in graph.variables):
        raise GraphError("the graph has been split before; split the graph that it was made from")
    if parts == 1:
        return graph
    chosen: dict[str, Along] = {}
    more = weights_to_split(graph, parts, min_width)
    while more:
        chosen |= more
        walk = _Walk(graph, parts, with_slots(graph, chosen))
        more = walk.only_sliced(walk.result(), min_width)
    return _divided(graph, parts, chosen)


def _divided(graph: Graph, parts: int, chosen: Mapping[str, Along]) -> Graph:
    """The graph with these variables split. Traced again for another batch, it has the same ones."""
    result = _Walk(graph, parts, with_slots(graph, chosen)).result() if chosen else graph
    trace_again = graph.retrace
    if trace_again is None:
        return result
    return result.with_(retrace=lambda batch: _divided(trace_again(batch), parts, chosen))


def block_name(name: str, along: Along, block: int) -> str:
    """The name of a block of a variable: "W[0:500]", along a second dimension "W[:, 0:500]"."""
    return f"{name}[{':, ' * along.dim}{along.bounds[block]}:{along.bounds[block + 1]}]"


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Variables that are in blocks (as `block_name` calls these) in one piece each, and all others as they are."""
    found: dict[str, Tensor] = {}
    blocks: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if (match := _BLOCK.fullmatch(name)) is None:
            found[name] = tensor
        else:
            blocks.setdefault((match["whole"], match["before"].count(":")), []).append((int(match["start"]), tensor))
    for (name, dim), parts in blocks.items():
        found[name] = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], dim)
    return found


class _Walk:
    """One pass over a graph, with the variables that are to be split."""

    def __init__(self, graph: Graph, parts: int, chosen: Mapping[str, Along]) -> None:
        self._graph, self._parts, self._chosen = graph, parts, chosen
        self._builder = Builder(parts, fake_mode(graph), wishes(graph, chosen), self._owner)

    def result(self) -> Graph:
        graph, builder = self._graph, self._builder
        names = {node: name for name, node in graph.placeholders().items()}
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                builder.values[node] = self._input(names[node], node)
            elif node.op != "output":
                builder.begin(node)
                builder.values[node] = (
                    self._rewritten(node)
                    if node.op == "call_function"
                    else builder.constant(node, attribute(graph.module, str(node.target)))
                )
        fetches = {name: builder.whole(graph.node(node)) for name, node in graph.fetches.items()}
        updates: dict[str, Node] = {}
        for variable, name in graph.updates.items():
            updates |= self._update(variable, graph.node(name))
        set_output(builder.fx, [*fetches.values(), *updates.values()])
        builder.fx.eliminate_dead_code()
        return graph.with_(
            module=step_module(graph.module, builder.fx),
            variables=tuple(block for variable in graph.variables for block in self._variables(variable)),
            fetches={name: node.name for name, node in fetches.items()},
            updates={name: node.name for name, node in updates.items()},
            initial=self._initial(),
        )

    def only_sliced(self, result: Graph, min_width: int) -> dict[str, Along]:
        """Variables that turned out to be read in slices alone, and may as well be split."""
        slices = {key: cut.blocks for key, cut in self._builder.slices.items()}
        inputs = result.placeholders()
        found: dict[str, Along] = {}
        for variable in result.variables:
            if variable.part is None:
                along = only_sliced(variable, inputs[variable.name], slices, min_width)
                if along is not None:
                    found[variable.name] = along
        return found

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _rewritten(self, node: Node) -> Value:
        """The node in blocks, if a rule fits, else whole."""
        builder = self._builder
        source = builder.values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if isinstance(source, Several) and node.target is operator.getitem:
            return source.values[node.args[1]]  # type: ignore[index]
        rule = RULES.get(node.target) or (elementwise if is_elementwise(node.target) else None)
        divided = any(builder.layouts(n) for n in node.all_input_nodes)
        if rule is not None and (divided or builder.wishes.get(node) is not None):
            value = rule(builder, node)
            if value is not None and fits(value, node.meta.get("val")):
                return value
        return builder.copy(node)

    def _input(self, name: str, node: Node) -> Value:
        along = self._chosen.get(name)
        if along is None:
            new = self._builder.fx.create_node("placeholder", node.name, (), {}, name=node.name)
            new.meta = dict(node.meta)
            return new
        blocks = []
        for block, (start, size) in enumerate(zip(along.bounds, along.sizes(), strict=False)):
            new = self._builder.fx.create_node("placeholder", f"{node.name}_block{block}", (), {})
            new.target = new.name
            with node.meta["val"].fake_mode:
                new.meta = {**node.meta, "val": node.meta["val"].narrow(along.dim, start, size)}
            blocks.append(new)
        return Split(along, tuple(blocks), weight=True)

    def _update(self, variable: str, node: Node) -> dict[str, Node]:
        along = self._chosen.get(variable)
        self._builder.begin(node)
        if along is None:
            return {variable: self._builder.whole(node)}
        blocks = self._builder.blocks(node, along)
        return {block_name(variable, along, k): block for k, block in enumerate(blocks)}

    # -- the signature -------------------------------------------------------------------------------------------

    def _variables(self, variable: Variable) -> list[Variable]:
        along = self._chosen.get(variable.name)
        if along is None:
            return [replace(variable, owner=self._home(variable))]
        found = []
        for k, size in enumerate(along.sizes()):
            shape = list(variable.spec.shape)
            shape[along.dim] = size
            spec = TensorSpec(tuple(shape), variable.spec.dtype, variable.spec.device)
            part = Part(variable.name, along.dim, along.bounds[k], along.bounds[k + 1])
            name, owner = block_name(variable.name, along, k), self._owner(variable.owner, k)
            found.append(Variable(name, spec, variable.role, owner, part))
        return found

    def _owner(self, owner: str, block: int | None) -> str:
        """The owner that a node or slot of a block names; "*" for an update node that serves all blocks."""
        along = self._chosen.get(owner)
        if along is None:
            return owner
        return "*" if block is None else block_name(owner, along, block)

    def _home(self, variable: Variable) -> str:
        """The owner of a variable that stays whole: of a split parameter's single numbers, the first block."""
        along = self._chosen.get(variable.owner)
        return variable.owner if along is None else block_name(variable.owner, along, 0)

    def _initial(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in self._graph.initial.items():
            along = self._chosen.get(name)
            if along is None:
                found[name] = tensor
                continue
            for k, size in enumerate(along.sizes()):
                found[block_name(name, along, k)] = tensor.detach().narrow(along.dim, along.bounds[k], size)
        return found
