"""Before a compiler sees a graph: our own operators become ATen, updates become assignments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.compile.in_place import assigned
from millrace.graph.graph import Graph
from millrace.graph.random import uniform_in_aten


def lowered(graph: Graph) -> GraphModule:
    """The module that Inductor compiles: ATen only, ending in `copy_` for every update."""
    module = assigned(graph)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.millrace.uniform.default:
            _inline_uniform(module, node)
    module.graph.lint()
    module.recompile()
    return module


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
