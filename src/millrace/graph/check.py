"""What must hold for every graph, checked after every pass in tests and after every trace and load.

1. Order: placeholders for the variables, then for the feeds, each as the signature says; computation; one output.
2. Nodes are call_function on an operator (ATen, a registered custom operator or a control-flow operator), getitem on
   the result of one, or get_attr of a constant or subgraph that the module holds.
3. Every argument node stands before its user and belongs to the same graph.
4. No operator mutates an argument; none draws from a hidden generator.
5. Every computing node has a NodeInfo and, unless it returns several tensors, a spec in meta["val"].
6. The output lists the fetches in order, then the updates in order; every one is a tensor.
7. An update names a variable and has that variable's shape and dtype.
8. Names: variables, feeds and nodes are unique.
9. Blocks are numbered from 0. The parts of a split variable follow each other from 0 without a gap, and each variable
   is as long as its part says.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node

from millrace.errors import GraphError
from millrace.graph.graph import INFO, Graph, spec_of
from millrace.graph.signature import TensorSpec


def check(graph: Graph) -> Graph:
    """Return the graph if every invariant holds. Raises GraphError listing what does not."""
    problems = [*_inputs(graph), *_nodes(graph), *_outputs(graph), *_names(graph), *_parts(graph)]
    if problems:
        listed = "\n  ".join(problems[:20])
        raise GraphError(f"{len(problems)} broken invariant(s) in the graph:\n  {listed}")
    return graph


def _inputs(graph: Graph) -> Iterator[str]:
    expected = [(v.name, v.spec) for v in graph.variables] + [(f.name, f.spec) for f in graph.feeds]
    found = [n for n in graph.fx.nodes if n.op == "placeholder"]
    if len(found) != len(expected):
        yield f"{len(found)} placeholders for {len(expected)} variables and feeds"
        return
    for node, (name, spec) in zip(found, expected, strict=True):
        if spec_of(node) is None or (spec_of(node).shape, spec_of(node).dtype) != (spec.shape, spec.dtype):  # type: ignore[union-attr]
            yield f"input {name!r} is {spec} in the signature but {spec_of(node)} in the graph"


def _nodes(graph: Graph) -> Iterator[str]:
    seen: set[Node] = set()
    computing = False
    for node in graph.fx.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                yield f"{node.name} uses {argument.name}, which does not stand before it"
        seen.add(node)
        if node.op == "placeholder":
            if computing:
                yield f"placeholder {node.name} stands after a computing node"
        elif node.op == "get_attr":
            if not isinstance(_attribute(graph.module, node), Tensor | GraphModule):
                yield f"{node.name} reads attribute {node.target!r}, which is neither a tensor nor a subgraph"
        elif node.op == "call_function":
            computing = True
            yield from _computing(node)
        elif node.op != "output":
            yield f"{node.name} is a {node.op} node"


def _attribute(module: GraphModule, node: Node) -> object:
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _computing(node: Node) -> Iterator[str]:
    target = node.target
    if isinstance(target, OpOverload):
        if target._schema.is_mutable:
            yield f"{node.name} mutates: {target}"
        if torch.Tag.nondeterministic_seeded in target.tags and not _without_dropout(node):
            yield f"{node.name} draws from a hidden generator: {target}"
    elif target is not operator.getitem and not isinstance(target, HigherOrderOperator):
        yield f"{node.name} calls {target!r}, which is not an operator"
    if INFO not in node.meta:
        yield f"{node.name} has no NodeInfo"
    elif (block := node.meta[INFO].block) is not None and (type(block) is not int or block < 0):
        yield f"{node.name} is of block {block!r}"
    if "val" not in node.meta:
        yield f"{node.name} has no shape and dtype"


def _without_dropout(node: Node) -> bool:
    """Fused attention is tagged as random for the sake of its dropout; with dropout 0 it draws nothing."""
    name = str(node.target)
    if "scaled_dot_product" not in name and "_cudnn_rnn" not in name:
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = dict(zip([a.name for a in schema], node.args, strict=False)) | dict(node.kwargs)
    return not values.get("dropout_p", values.get("dropout", 0.0))


def _outputs(graph: Graph) -> Iterator[str]:
    outputs = [n for n in graph.fx.nodes if n.op == "output"]
    if len(outputs) != 1:
        yield f"{len(outputs)} output nodes"
        return
    results = [n.name for n in outputs[0].args[0] if isinstance(n, Node)]
    expected = [*graph.fetches.values(), *graph.updates.values()]
    if results != expected:
        yield f"the output lists {results}, the signature {expected}"
        return
    by_name = {n.name: n for n in graph.fx.nodes}
    specs = {v.name: v.spec for v in graph.variables}
    for fetch, name in graph.fetches.items():
        if spec_of(by_name[name]) is None:
            yield f"fetch {fetch!r} ({name}) is not a tensor"
    for variable, name in graph.updates.items():
        new: TensorSpec | None = spec_of(by_name[name])
        old = specs.get(variable)
        if old is None:
            yield f"{name} updates {variable!r}, which is no variable"
        elif new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
            yield f"variable {variable!r} is {old}, its update {name} is {new}"


def _names(graph: Graph) -> Iterator[str]:
    for kind, names in (
        ("node", [n.name for n in graph.fx.nodes]),
        ("variable", [v.name for v in graph.variables]),
        ("feed", [f.name for f in graph.feeds]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                yield f"{count} {kind}s are called {name!r}"


def _parts(graph: Graph) -> Iterator[str]:
    ends: dict[str, int] = {}
    for variable in graph.variables:
        part = variable.part
        if part is None:
            continue
        shape = variable.spec.shape
        if not 0 <= part.dim < len(shape) or shape[part.dim] != part.stop - part.start:
            yield f"variable {variable.name!r} is {variable.spec}, but its part is {part}"
        if part.start != ends.get(part.whole, 0):
            yield f"{variable.name!r} begins at {part.start}, the parts of {part.whole!r} before it end elsewhere"
        ends[part.whole] = part.stop
