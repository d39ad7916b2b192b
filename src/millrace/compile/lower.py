"""Before a compiler sees a graph: our own operators become ATen, updates become assignments."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.compile.in_place import assigned
from millrace.graph.checked_index import checked_index
from millrace.graph.graph import Graph
from millrace.graph.random import uniform_in_aten

aten = torch.ops.aten


def lowered(graph: Graph) -> tuple[GraphModule, list[Tensor]]:
    """The module that Inductor compiles: ATen only, ending in `copy_` for every update.

    Constants become inputs after the feeds, so that a compiled artifact does not depend on the process that made it;
    their values are returned beside the module.
    """
    module = assigned(graph)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.millrace.uniform.default:
            _inline_uniform(module, node)
        elif node.target is checked_index:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is aten.pow.Scalar:
            _power_as_exponential(module, node)
        elif node.target is aten.addmm.default:
            _bias_apart(module, node)
        elif node.target is aten.embedding_dense_backward.default:
            _rows_in_order(module, node)
        elif node.target in (aten.add.Tensor, aten.sub.Tensor) and "alpha" in node.kwargs:
            _factor_apart(module, node)
    constants = _constants_as_inputs(module)
    module.graph.lint()
    module.recompile()
    return module, constants


def _power_as_exponential(module: GraphModule, node: Node) -> None:
    """Write `b ** n` as `exp(n log b)` where n is a single number, such as Adam's count of steps.

    Inductor takes what is used often and has an exponential in it for worth keeping. A power it would work out again
    for every few elements of every parameter.
    """
    base, exponent = node.args
    value = node.meta.get("val")
    if not isinstance(base, int | float) or base <= 0 or not isinstance(value, Tensor) or value.ndim:
        return
    if not value.is_floating_point():
        return
    with module.graph.inserting_before(node):
        product = module.graph.call_function(aten.mul.Tensor, (exponent, math.log(base)))
        power = module.graph.call_function(aten.exp.default, (product,))
    power.meta["val"] = product.meta["val"] = value
    node.replace_all_uses_with(power)
    module.graph.erase_node(node)


def _factor_apart(module: GraphModule, node: Node) -> None:
    """Write `add(a, b, alpha=c)` as `add(a, mul(b, c))`.

    Where `a` is a matrix product, Inductor (2.13) puts the sum into the product and loses the factor: the weight decay
    of `torch.optim.SGD` came out as one.
    """
    first, second = node.args
    with module.graph.inserting_before(node):
        scaled = module.graph.call_function(aten.mul.Tensor, (second, node.kwargs["alpha"]))
        total = module.graph.call_function(node.target, (first, scaled))  # type: ignore[arg-type]
    value = second.meta.get("val") if isinstance(second, Node) else None
    if isinstance(value, Tensor):
        scaled.meta["val"] = value
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)


def _bias_apart(module: GraphModule, node: Node) -> None:
    """Write `addmm(bias, a, b)` as `mm(a, b) + bias`, whose sum is fused with what comes after.

    The library's product first fills its result with the bias, in a pass of its own over the memory. Inductor would put
    the two together again, but for the view in between. In lower precisions that would round once more.
    """
    value = node.meta.get("val")
    if node.kwargs or not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        return
    if value.device.type != "cpu":
        return
    bias, a, b = node.args
    with module.graph.inserting_before(node):
        product = module.graph.call_function(aten.mm.default, (a, b))
        lifted = module.graph.call_function(aten.unsqueeze.default, (product, 0))
        total = module.graph.call_function(aten.add.Tensor, (lifted, bias))
        result = module.graph.call_function(aten.squeeze.dim, (total, 0))
    product.meta["val"] = result.meta["val"] = value
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _rows_in_order(module: GraphModule, node: Node) -> None:
    """Write the gradient of a lookup as `scatter_reduce`, for which Inductor calls PyTorch's kernel on several threads.

    That sorts the indices, so that each row is one thread's. Of the gradient itself Inductor makes an atomic sum for
    every number: two threads take longer than one.
    """
    gradient, index, rows, padding, by_frequency = node.args
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != "cpu" or by_frequency or padding >= 0:  # type: ignore[operator]
        return
    assert isinstance(gradient, Node)
    width, count = value.shape[1], gradient.meta["val"].numel() // value.shape[1]
    with module.graph.inserting_before(node):

        def call(target: Any, *args: Any, **settings: Any) -> Node:
            return module.graph.call_function(target, args, settings)

        flat = call(aten.reshape.default, gradient, [count, width])
        places = call(aten.expand.default, call(aten.reshape.default, index, [count, 1]), [count, width])
        zeros = call(aten.full.default, [rows, width], 0, dtype=value.dtype, device=value.device)
        total = call(aten.scatter_reduce.two, zeros, 0, places, flat, "sum")
    total.meta["val"] = value
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)


def _constants_as_inputs(module: GraphModule) -> list[Tensor]:
    constants: list[Tensor] = []
    last = list(module.graph.find_nodes(op="placeholder"))
    for node in list(module.graph.find_nodes(op="get_attr")):
        value = operator.attrgetter(str(node.target))(module)
        if not isinstance(value, Tensor):
            continue  # the body of a loop or branch
        with module.graph.inserting_after(last[-1]) if last else module.graph.inserting_before(node):
            placeholder = module.graph.placeholder(f"constant_{len(constants)}")
        placeholder.meta = dict(node.meta)
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        last.append(placeholder)
        constants.append(value)
    return constants


def _inline_uniform(module: GraphModule, node: Node) -> None:
    random, op, size = node.args
    assert isinstance(random, Node)

    def body(value: Tensor) -> Tensor:
        return uniform_in_aten(value, op, size)  # type: ignore[arg-type]

    inner = make_fx(body, tracing_mode="fake")(torch.zeros(2, dtype=torch.int64, device=random.meta["val"].device))
    mapping: dict[Node, Node] = {}
    for source in inner.graph.nodes:
        if source.op == "placeholder":
            mapping[source] = random
        elif source.op == "output":
            result = source.args[0]
            node.replace_all_uses_with(mapping[result[0] if isinstance(result, tuple | list) else result])
        else:
            with module.graph.inserting_before(node):
                mapping[source] = module.graph.node_copy(source, lambda n: mapping[n])
            # Its fake tensor belongs to another fake mode; Inductor makes its own.
            mapping[source].meta.pop("val", None)
    module.graph.erase_node(node)
