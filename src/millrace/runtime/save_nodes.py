"""Save and restore as nodes: two small graphs on the side of a step's graph, over the same variables.

They run through the session like any other part, so that whatever places a variable also places the saving of it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from millrace.compile.eager import Compiled, compile_eager
from millrace.errors import CheckpointError
from millrace.graph.check import check
from millrace.graph.graph import INFO, Graph, NodeInfo, set_output
from millrace.graph.signature import Feed, TensorSpec
from millrace.runtime.commit import Digest
from millrace.runtime.shard import read_shard_into, write_shard

SAVE, RESTORE = "save", "restore"
_PATH = "path"
_PATH_BYTES = 4096  # a path is fed as UTF-8, padded with zeros
_DIGEST_BYTES = 40  # sha256, then the file's size


_SAVE_SCHEMA = "(Tensor[] values, str[] names, Tensor path) -> Tensor"
_RESTORE_SCHEMA = "(Tensor[] like, str[] names, Tensor path) -> Tensor[]"


@torch.library.custom_op("millrace::save_shard", mutates_args=(), schema=_SAVE_SCHEMA)
def _save_shard(values: list[Tensor], names: list[str], path: Tensor) -> Tensor:
    digest = write_shard(_decode(path), dict(zip(names, values, strict=True)))
    raw = bytes.fromhex(digest.sha256) + digest.size_bytes.to_bytes(8, "little")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@_save_shard.register_fake
def _(values: list[Tensor], names: list[str], path: Tensor) -> Tensor:
    return torch.empty(_DIGEST_BYTES, dtype=torch.uint8)


@torch.library.custom_op("millrace::restore_shard", mutates_args=(), schema=_RESTORE_SCHEMA)
def _restore_shard(like: list[Tensor], names: list[str], path: Tensor) -> list[Tensor]:
    targets = {name: torch.empty_like(tensor) for name, tensor in zip(names, like, strict=True)}
    read_shard_into(_decode(path), None, targets)
    return list(targets.values())


@_restore_shard.register_fake
def _(like: list[Tensor], names: list[str], path: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in like]


@dataclass(frozen=True)
class SideGraph:
    """A save or restore graph, ready to run."""

    graph: Graph
    run_graph: Compiled

    def run(self, variables: Mapping[str, Tensor], path: Path) -> list[Tensor]:
        """Run over `variables` (one per variable of the graph, in any order) with the file `path`."""
        return self.run_graph([variables[v.name] for v in self.graph.variables], [_encode(path)])

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        """Run the save node on `tensors` (a snapshot of the variables); returns the file's digest."""
        raw = bytes(self.run(tensors, path)[0].tolist())
        return Digest(raw[:32].hex(), int.from_bytes(raw[32:], "little"))


def save_graph_of(graph: Graph) -> SideGraph:
    """The graph that writes the variables of `graph` into one file; its fetch "digest" is the file's hash and size."""
    fx, inputs, path = _inputs(graph)
    names = [v.name for v in graph.variables]
    digest = _call(fx, torch.ops.millrace.save_shard.default, (inputs, names, path))
    set_output(fx, [digest])
    return _side(graph, fx, fetches={"digest": digest.name}, updates={})


def restore_graph(graph: Graph) -> SideGraph:
    """The graph whose updates give every variable of `graph` its value from one file."""
    fx, inputs, path = _inputs(graph)
    names = [v.name for v in graph.variables]
    values = _call(fx, torch.ops.millrace.restore_shard.default, (inputs, names, path))
    items = []
    for index, source in enumerate(inputs):
        node = fx.call_function(operator.getitem, (values, index))
        node.meta = {"val": source.meta["val"], INFO: NodeInfo()}
        items.append(node)
    set_output(fx, items)
    return _side(graph, fx, fetches={}, updates={n: item.name for n, item in zip(names, items, strict=True)})


def _inputs(graph: Graph) -> tuple[torch.fx.Graph, list[Node], Node]:
    fx = torch.fx.Graph()
    inputs = []
    for source in list(graph.placeholders().values())[: len(graph.variables)]:
        node = fx.placeholder(source.name)
        node.meta = {"val": source.meta["val"]}
        inputs.append(node)
    path = fx.placeholder("feed_path")
    mode: Any = getattr(inputs[0].meta["val"], "fake_mode", None) if inputs else None
    with mode or FakeTensorMode():
        path.meta = {"val": torch.empty(_PATH_BYTES, dtype=torch.uint8)}
    return fx, inputs, path


def _call(fx: torch.fx.Graph, target: Any, args: tuple[Any, ...]) -> Node:
    node = fx.call_function(target, args)
    fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with args[-1].meta["val"].fake_mode:
        node.meta = {"val": target(*fakes), INFO: NodeInfo()}
    return node


def _side(graph: Graph, fx: torch.fx.Graph, fetches: dict[str, str], updates: dict[str, str]) -> SideGraph:
    side = Graph(
        module=GraphModule(torch.nn.Module(), fx, class_name="Side"),
        variables=graph.variables,
        feeds=(Feed(_PATH, TensorSpec((_PATH_BYTES,), torch.uint8)),),
        fetches=fetches,
        updates=updates,
        feed_tree="",
    )
    check(side)
    return SideGraph(side, compile_eager(side))


def _encode(path: Path) -> Tensor:
    raw = os.fsencode(path)
    if len(raw) > _PATH_BYTES:
        raise CheckpointError(f"the path {path} is longer than {_PATH_BYTES} bytes")
    return torch.frombuffer(bytearray(raw.ljust(_PATH_BYTES, b"\0")), dtype=torch.uint8)


def _decode(path: Tensor) -> Path:
    return Path(os.fsdecode(bytes(path.tolist()).rstrip(b"\0")))
