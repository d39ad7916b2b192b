"""From new values to assignments: how a functional graph updates its variables in place.

`assigned` is for a compiler that plans memory itself: the graph ends in `copy_` nodes. `in_place` is for the eager
tier: where nothing reads a variable after its update begins, the chain of operators that makes the new value runs in
the variable's own memory (`p - lr * g` becomes `p.sub_(lr * g)`), so that no copy of the parameters is ever made. And
what is computed on the way and read once is written over by the operator that reads it, as the sum of a gradient over
the parts of a batch is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from millrace.graph.aliases import makes_memory, may_alias
from millrace.graph.graph import INFO, Graph, copy_fx, feed_key, set_output

aten = torch.ops.aten

# Operators that may write their result over their first argument, and how.
_IN_PLACE: dict[OpOverload, OpOverload] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addcdiv.default: aten.addcdiv_.default,
    aten.lerp.Scalar: aten.lerp_.Scalar,
    aten.lerp.Tensor: aten.lerp_.Tensor,
    aten.index_put.default: aten.index_put_.default,
    aten.clamp.default: aten.clamp_.default,
}
# Its result lies row by row, which a variable need not.
_OVER_VALUES = {**_IN_PLACE, aten.addmm.default: aten.addmm_.default}


def assigned(graph: Graph) -> GraphModule:
    """A module that takes the graph's inputs, returns its fetches and assigns every update with `copy_` at the end."""
    return _with_assignments(graph, reuse_memory=False)


def in_place(graph: Graph, writable: Collection[str] = ()) -> GraphModule:
    """The same, with results computed in memory that is there already, where that is safe: the variables' own for their
    new values, and that of a value which nothing else reads.

    Args: writable: feeds that nobody reads afterwards, so that their memory may be used too.
    """
    return _with_assignments(graph, writable, reuse_memory=True)


def _with_assignments(graph: Graph, writable: Collection[str] = (), *, reuse_memory: bool) -> GraphModule:
    fx, mapping = copy_fx(graph.module)
    by_name = {old.name: new for old, new in mapping.items()}
    inputs = {name: mapping[node] for name, node in graph.placeholders().items()}
    fetched = [by_name[name] for name in graph.fetches.values()]
    updates = {inputs[variable]: by_name[name] for variable, name in graph.updates.items()}
    output = next(iter(fx.find_nodes(op="output")))
    if reuse_memory:
        _add_products_of_blocks(fx)
    chains = _chains(fx, updates, set(fetched)) if reuse_memory else {}
    copies = [(variable, value) for variable, value in updates.items() if variable not in chains]
    links = {link for chain in chains.values() for link in chain}
    given = {inputs[feed_key(name)] for name in writable}
    for node in [*links, *(_overwriting(fx, given, links) if reuse_memory else [])]:
        node.target = _OVER_VALUES[node.target]  # type: ignore[index]
    with fx.inserting_before(output):
        # A fetch must outlast later steps, which write over every variable, also over those this part only reads; and
        # what the caller does to it must reach neither the batch nor a constant of the graph.
        kept = {node for node in fx.nodes if node.op in ("placeholder", "get_attr") and node not in given}
        results = [_own_memory(fx, node, kept) for node in fetched]
        # A value that is itself a variable's old value, or a view of one, must be saved from the assignments.
        saved = {value: _own_memory(fx, value, set(updates)) for _, value in copies}
        for variable, value in copies:
            node = fx.call_function(aten.copy_.default, (variable, saved[value]))
            node.meta["val"] = variable.meta["val"]
    set_output(fx, results)
    return GraphModule(graph.module, fx, class_name="Step")


def _chains(graph: torch.fx.Graph, updates: dict[Node, Node], fetched: set[Node]) -> dict[Node, list[Node]]:
    """For every variable whose update can run in its own memory, the operators that do it, in order."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    users = Counter(updates.values())
    found: dict[Node, list[Node]] = {}
    for variable, value in updates.items():
        chain = _chain(variable, value)
        # The new value of two variables, or a result, needs memory of its own.
        if chain and value not in fetched and users[value] == 1:
            steps = zip([variable, *chain], chain, strict=False)
            if all(_read_before(old, overwriting, order) for old, overwriting in steps):
                found[variable] = chain
    return found


def _chain(variable: Node, value: Node) -> list[Node]:
    """The operators from `variable` to `value`, each on the first argument of the next; [] if there is none."""
    chain: list[Node] = []
    node = value
    while node is not variable:
        if node.target not in _IN_PLACE or not isinstance(node.args[0], Node) or not _same(node, variable):
            return []
        if node.args[0] in pytree.tree_leaves((node.args[1:], node.kwargs)):
            return []  # p * p and p[[p]] = x read what they write; leave such things to the copy
        chain.insert(0, node)
        node = node.args[0]
    return chain


def _add_products_of_blocks(graph: torch.fx.Graph) -> None:
    """Where a sum over the blocks of a split layer grows by a product, one operator instead of two.

    The graph has two, since blocks may be on different devices and need not wait for each other; here they run one
    after the other. What is rounded on the way is a partial sum, which the step that was split did not have.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        total, product, *_ = node.args
        if (
            isinstance(product, Node)
            and product.target is aten.mm.default
            and product.meta[INFO].block is not None
            and product.meta["val"].is_floating_point()
            and list(product.users) == [node]
            and not node.kwargs
            and makes_memory(total)
            and _is_only_reader(node)
        ):
            node.target, node.args = aten.addmm.default, (total, *product.args)
            graph.erase_node(product)


def _overwriting(graph: torch.fx.Graph, given: set[Node], links: set[Node]) -> list[Node]:
    """The operators that may write their result over a value of no other use.

    Args: given: inputs that may be written over. links: operators that write over a variable.
    """
    own = given | {node for node in graph.nodes if makes_memory(node)}
    return [
        node
        for node in graph.nodes
        if node.target in _OVER_VALUES and node not in links and node.args[0] in own and _is_only_reader(node)
    ]


def _is_only_reader(node: Node) -> bool:
    """Whether nothing but `node` reads its first argument, and it only in that place, for a result that lies alike."""
    first = node.args[0]
    assert isinstance(first, Node)
    others = pytree.tree_leaves((node.args[1:], node.kwargs))
    alike = _same(node, first) and node.meta["val"].stride() == first.meta["val"].stride()
    return alike and list(first.users) == [node] and first not in others


def _same(node: Node, variable: Node) -> bool:
    a, b = node.meta.get("val"), variable.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _read_before(old: Node, overwriting: Node, order: dict[Node, int]) -> bool:
    """Whether nothing else reads the value `old`, or a view of it, once `overwriting` has put the next one there."""
    end = order[overwriting]
    waiting, seen = [old], {old}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user is overwriting and node is old:
                continue
            if user.op == "output" or order[user] >= end:
                return False
            if user not in seen and may_alias(user):
                seen.add(user)
                waiting.append(user)
    return True


def _own_memory(graph: torch.fx.Graph, node: Node, written: set[Node]) -> Node:
    """`node`, or a clone of it when it shares memory with one of the inputs that are `written`."""
    root = node
    while root.op == "call_function" and may_alias(root) and root.args and isinstance(root.args[0], Node):
        root = root.args[0]
    if root not in written:
        return node
    clone = graph.call_function(aten.clone.default, (node,))
    clone.meta["val"] = node.meta.get("val")
    return clone
