"""A graph as plain JSON values and named constant tensors, and back.

Numbers, strings, None and lists stand for themselves; everything else is an object with one key that says its type:
{"node": "add_1"}, {"dtype": "bfloat16"}, {"tuple": [...]}, {"float": "inf"}, … Nothing in a document is ever evaluated;
names are checked before they reach the code that torch.fx generates from them.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from millrace.errors import GraphError
from millrace.graph.graph import INFO, NodeInfo, Wish
from millrace.graph.operators import find_operator, operator_name
from millrace.graph.signature import Phase

Document = dict[str, Any]
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.layout)}
_FORMATS = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.memory_format)}


def encode_module(module: GraphModule, constants: dict[str, Tensor], prefix: str = "") -> Document:
    """The nodes and subgraphs of `module`; its tensors go into `constants` under `prefix` and their own names.

    Raises: GraphError for what no graph file can hold, naming the node.
    """
    if type(module.graph._codegen) is not CodeGen:
        raise GraphError(f"graph {prefix or 'of the step'!r} nests its inputs; expected plain tensors in and out")
    nodes, subgraphs, kept = [], {}, {}
    for node in module.graph.nodes:
        try:
            nodes.append(_encode_node(node))
            if node.op == "get_attr":
                held = attribute(module, str(node.target))
                if isinstance(held, GraphModule):
                    subgraphs[str(node.target)] = encode_module(held, constants, f"{prefix}{node.target}/")
                else:
                    kept[str(node.target)] = constant_spec(held)
                    constants[f"{prefix}{node.target}"] = held
        except GraphError as error:
            raise GraphError(f"node {prefix}{node.name}: {error}") from None
    return {"nodes": nodes, "subgraphs": subgraphs, "constants": kept}


def decode_module(document: Document, constants: Mapping[str, Tensor], prefix: str = "") -> GraphModule:
    """The inverse of `encode_module`, with fake values in `meta["val"]` for every node that had one.

    Raises: GraphError for an operator that is not registered or a name that may not be; KeyError, TypeError, ValueError
    or AttributeError for a document of another form.
    """
    return _Decoder(FakeTensorMode()).module(document, constants, prefix)


def attribute(module: GraphModule, path: str) -> Any:
    """What a get_attr node reads."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _encode_node(node: Node) -> Document:
    target = operator_name(node.target) if node.op == "call_function" else str(node.target)
    entry: Document = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        entry["args"] = [encode(a) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
    if "val" in node.meta and node.op != "output":
        entry["val"] = encode(node.meta["val"])
    if INFO in node.meta:
        entry["info"] = {k: v for k, v in asdict(node.meta[INFO]).items() if v is not None}
    return entry


def encode(value: Any) -> Any:
    """One argument or value as JSON. Raises: GraphError for a type that has no form in a file."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    for kind, (known, write, _) in _SINGLE.items():
        if isinstance(value, known):
            return {kind: write(value)}
    raise GraphError(f"a graph file cannot hold {type(value).__name__} ({value!r:.60}) as an argument")


def _encode_fake(tensor: Tensor) -> Document:
    if not isinstance(tensor, FakeTensor):
        raise GraphError("a tensor stands among the arguments; expected it as a constant that a get_attr node reads")
    sizes = (*tensor.shape, *tensor.stride()) if tensor.layout is torch.strided else (None,)
    if any(type(n) is not int for n in sizes):
        raise GraphError(f"a graph file cannot hold {tensor.layout} tensors or sizes that are not numbers: {tensor}")
    return constant_spec(tensor)


def constant_spec(tensor: Any) -> Document:
    """Shape, stride, dtype and device of a tensor as JSON."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise GraphError(f"a graph file cannot hold {type(tensor).__name__} as a constant; expected a dense tensor")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "device": str(tensor.device),
    }


def empty(spec: Document) -> Tensor:
    """An unfilled tensor of that spec; a fake one under a fake mode."""
    return torch.empty_strided(
        spec["shape"], spec["stride"], dtype=_DTYPES[spec["dtype"]], device=torch.device(spec["device"])
    )


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


# kind -> (type, value -> JSON, JSON -> value); the last is None where the decoder's own state is needed
_Single = tuple[Any, Callable[[Any], Any], Callable[[Any], Any] | None]
_SINGLE: dict[str, _Single] = {
    "node": (Node, lambda n: n.name, None),
    "tensor": (Tensor, _encode_fake, None),
    "dict": (dict, lambda d: [[encode(k), encode(v)] for k, v in d.items()], None),
    "slice": (slice, lambda s: [encode(s.start), encode(s.stop), encode(s.step)], None),
    "dtype": (torch.dtype, _short, _DTYPES.__getitem__),
    "device": (torch.device, str, torch.device),
    "layout": (torch.layout, _short, _LAYOUTS.__getitem__),
    "memory_format": (torch.memory_format, _short, _FORMATS.__getitem__),
    "complex": (complex, lambda c: [encode(c.real), encode(c.imag)], None),
    "float": (float, lambda f: repr(float(f)), float),
    "operator": (OpOverload | HigherOrderOperator, operator_name, find_operator),
}

_COMPOUND: dict[str, Callable[..., Any]] = {"tuple": lambda *parts: parts, "slice": slice, "complex": complex}


class _Decoder:
    """Rebuilds modules; all fake values belong to one mode, as torch wants it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def module(self, document: Document, constants: Mapping[str, Tensor], prefix: str) -> GraphModule:
        held: dict[str, Any] = {name: constants[prefix + name] for name in document["constants"]}
        for name, inner in document["subgraphs"].items():
            held[name] = self.module(inner, constants, f"{prefix}{name}/")
        graph, nodes = torch.fx.Graph(), dict[str, Node]()
        for entry in document["nodes"]:
            node = self._node(graph, entry, nodes)
            nodes[node.name] = node
            if node.op == "get_attr" and node.target not in held:
                raise GraphError(f"node {node.name} reads {node.target!r}, which the file does not hold")
        return GraphModule(held, graph, class_name="Step")

    def _node(self, graph: torch.fx.Graph, entry: Document, nodes: Mapping[str, Node]) -> Node:
        name, op, target = entry["name"], entry["op"], entry["target"]
        if op == "call_function":
            target = find_operator(target)
        elif op in ("placeholder", "output"):
            _checked(target)
        elif op == "get_attr":
            for part in target.split("."):
                _checked(part)
        else:
            raise GraphError(f"node {name!r} is a {op!r} node; expected placeholder, call_function, get_attr or output")
        args = tuple(self.value(a, nodes) for a in entry.get("args", []))
        kwargs = {_checked(k): self.value(v, nodes) for k, v in entry.get("kwargs", {}).items()}
        node = graph.create_node(op, target, args, kwargs, name=_checked(name))
        if node.name != name:
            raise GraphError(f"two nodes are called {name!r}, or Python reserves that name")
        if "val" in entry:
            with self.mode:
                node.meta["val"] = self.value(entry["val"], {})
        if "info" in entry:
            node.meta[INFO] = _info(entry["info"])
        return node

    def value(self, document: Any, nodes: Mapping[str, Node]) -> Any:
        """The inverse of `encode`."""
        if isinstance(document, list):
            return [self.value(d, nodes) for d in document]
        if not isinstance(document, dict):
            return document
        ((kind, content),) = document.items()
        if kind == "node":
            return nodes[content]
        if kind == "tensor":
            return empty(content)
        if kind == "dict":
            return {self.value(k, nodes): self.value(v, nodes) for k, v in content}
        if kind in _COMPOUND:
            return _COMPOUND[kind](*[self.value(d, nodes) for d in content])
        read = _SINGLE[kind][2]
        assert read is not None
        return read(content)


def _info(document: Document) -> NodeInfo:
    decoded: Document = {key: Wish(**document[key]) for key in ("device", "together") if key in document}
    return NodeInfo(**{**document, **decoded, "phase": Phase(document["phase"])})


def _checked(name: str) -> str:
    """A name that may stand in generated code. Raises: GraphError for any other."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise GraphError(f"{name!r} cannot be a name in a graph; expected letters, digits and underscores")
    return name
