"""Graphs in files: one safetensors file per graph, its constants as tensors and its nodes as JSON in the metadata.

Nothing is unpickled and nothing in a file is evaluated, so that a graph from a stranger can be looked at. (It can still
call any registered operator when it is run.) A file carries a checksum over all that it says.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from millrace.errors import GraphError
from millrace.files import replace_bytes
from millrace.graph.check import check
from millrace.graph.encoding import Document, decode_module, empty, encode_module
from millrace.graph.graph import Graph
from millrace.graph.signature import Feed, Part, Role, TensorSpec, Variable

FORMAT = "millrace-graph"
VERSION = "1"
# What making a graph of a document of another form can end in (SyntaxError: in the code that torch.fx generates).
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, SyntaxError)


def save_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write `graph` to a file, whole or not at all.

    The variables' values are not part of a graph: checkpoints hold them.

    Raises: GraphError when the graph holds what no file can (a constant that is not dense, an operator without a
    name). OSError when the file cannot be written; what stood under `path` is then untouched.
    """
    replace_bytes(Path(path), graph_bytes(graph))


def graph_bytes(graph: Graph) -> bytes:
    """What `save_graph` writes, to be sent. Raises: GraphError as `save_graph` does."""
    document, constants = _encode(graph)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    tensors = {name: _storable(tensor) for name, tensor in constants.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "graph": text,
        "sha256": _checksum(text, tensors),
    }
    return safetensors.torch.save(tensors, metadata)


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a graph that `save_graph` wrote, and check it.

    The loaded graph computes the same bits as the saved one. It has no `initial` values and cannot be traced again.

    Raises: GraphError when the file is damaged, of an unknown version, or names an operator that is not registered in
    this process. OSError when it cannot be read.
    """
    metadata, tensors = _read(Path(path))
    try:
        document = json.loads(metadata["graph"])
        return check(_decode(document, tensors))
    except GraphError as error:
        raise GraphError(f"{path}, written with torch {metadata.get('torch')}: {error}") from error
    except _UNREADABLE as error:
        raise GraphError(f"{path} does not describe a graph: {type(error).__name__}: {error}") from error


def graph_from_bytes(content: bytes) -> Graph:
    """The graph of which `graph_bytes` made this, checked. Raises: GraphError as `load_graph` does."""
    with tempfile.NamedTemporaryFile(prefix="millrace-graph-") as file:
        file.write(content)
        file.flush()
        return load_graph(file.name)


def graph_digest(graph: Graph) -> str:
    """A sha256, in hexadecimal, over everything in the graph that determines what it computes.

    Operators, arguments, shapes, strides, dtypes, devices, constants and the signature count; names of nodes, module
    scopes and source lines do not. Equal for two traces of the same step in two processes: a key for compiled
    artifacts, together with the versions of torch and of the kernels behind custom operators.

    Raises: GraphError as `save_graph` does.
    """
    document, constants = _encode(graph)
    digests = {name: hashlib.sha256(_bytes(_storable(tensor))).hexdigest() for name, tensor in constants.items()}
    step = document["module"]
    numbers = _numbers(step)
    signature = document["signature"]
    for results in ("fetches", "updates"):
        signature[results] = [[name, numbers[node]] for name, node in signature[results].items()]
    canonical = [signature, _canonical(step, digests, "")]
    return hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode()).hexdigest()


def _encode(graph: Graph) -> tuple[Document, dict[str, Tensor]]:
    constants: dict[str, Tensor] = {}
    signature = {
        "variables": [_encode_variable(v) for v in graph.variables],
        "feeds": [{"name": f.name, "spec": _encode_spec(f.spec)} for f in graph.feeds],
        "fetches": dict(graph.fetches),
        "updates": dict(graph.updates),
        "feed_tree": graph.feed_tree,
        "steps": graph.steps,
    }
    return {"signature": signature, "module": encode_module(graph.module, constants)}, constants


def _decode(document: Document, tensors: Mapping[str, Tensor]) -> Graph:
    module, signature = document["module"], document["signature"]
    return Graph(
        module=decode_module(module, _restored(module, tensors, "")),
        variables=tuple(
            Variable(v["name"], _decode_spec(v["spec"]), Role(v["role"]), v["owner"], _decode_part(v.get("part")))
            for v in signature["variables"]
        ),
        feeds=tuple(Feed(f["name"], _decode_spec(f["spec"])) for f in signature["feeds"]),
        fetches=signature["fetches"],
        updates=signature["updates"],
        feed_tree=signature["feed_tree"],
        steps=signature["steps"],
    )


def _encode_variable(variable: Variable) -> Document:
    document = {**asdict(variable), "spec": _encode_spec(variable.spec)}
    # Left out where there is none, so that graphs that are not split have the digests that they always had.
    return {key: value for key, value in document.items() if value is not None}


def _decode_part(document: Document | None) -> Part | None:
    if document is None:
        return None
    return Part(document["whole"], document["dim"], document["start"], document["stop"])


def _encode_spec(spec: TensorSpec) -> Document:
    return {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch."), "device": spec.device}


def _decode_spec(document: Document) -> TensorSpec:
    dtype = getattr(torch, document["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"{document['dtype']!r} is not a dtype")
    return TensorSpec(tuple(document["shape"]), dtype, document["device"])


def _storable(tensor: Tensor) -> Tensor:
    """The same numbers in a form that safetensors takes: contiguous, on the CPU, sharing memory with nothing."""
    if isinstance(tensor, FakeTensor):
        raise GraphError("a constant of the graph has no values (it is a fake tensor)")
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(plain) if plain.is_complex() else plain


def _restored(module: Document, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The constants of a module and its subgraphs as they were: dtype, device and stride."""
    found: dict[str, Tensor] = {}
    for name, spec in module["constants"].items():
        stored = tensors[prefix + name]
        value = torch.view_as_complex(stored) if spec["dtype"].startswith("complex") else stored
        like = empty({**spec, "device": "meta"})
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise GraphError(f"constant {name!r} is {value.dtype}{list(value.shape)} in the file, not {spec}")
        # preserve_format keeps the strides of dense memory only. Overlapping memory (an expanded tensor) cannot be
        # filled; such a constant comes back contiguous.
        dense = torch.empty_like(like, memory_format=torch.preserve_format).stride() == like.stride()
        found[prefix + name] = empty(spec).copy_(value) if dense else value.to(spec["device"])
    for name, inner in module["subgraphs"].items():
        found |= _restored(inner, tensors, f"{prefix}{name}/")
    return found


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file whose checksum is right."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise GraphError(f"{path} is damaged or no graph file ({error}). Save the graph again.") from error
    if metadata.get("format") != FORMAT:
        raise GraphError(f"{path} is a safetensors file, but not of a graph; expected one that `save_graph` wrote.")
    if metadata.get("version") != VERSION:
        raise GraphError(
            f"{path} has format version {metadata.get('version')!r}; this millrace reads {VERSION!r}. "
            "Load it with the millrace that wrote it, or trace and save the graph again."
        )
    if metadata.get("sha256") != _checksum(metadata.get("graph", ""), tensors):
        raise GraphError(f"{path} is damaged: its checksum does not fit its content. Save the graph again.")
    return metadata, tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        total.update(_bytes(tensors[name]))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _numbers(module: Document) -> dict[str, int]:
    return {entry["name"]: number for number, entry in enumerate(module["nodes"])}


def _canonical(module: Document, digests: Mapping[str, str], prefix: str) -> list[Any]:
    """The nodes of a module without names: numbers for nodes, contents for constants and subgraphs."""
    numbers = _numbers(module)
    found: list[Any] = []
    for entry in module["nodes"]:
        target = entry["target"] if entry["op"] == "call_function" else ""
        if entry["op"] == "get_attr":
            name = entry["target"]
            inner, spec = module["subgraphs"].get(name), module["constants"].get(name)
            target = [spec, digests[prefix + name]] if spec else _canonical(inner, digests, f"{prefix}{name}/")
        arguments = [entry.get("args"), sorted(entry.get("kwargs", {}).items())]
        found.append([entry["op"], target, _renumbered(arguments, numbers), entry.get("val")])
    return found


def _renumbered(value: Any, numbers: Mapping[str, int]) -> Any:
    if isinstance(value, dict):
        return {k: numbers[v] if k == "node" else _renumbered(v, numbers) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_renumbered(v, numbers) for v in value]
    return value
