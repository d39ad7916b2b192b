"""Event files for TensorBoard: scalars, texts, hyperparameters, and the dataflow graph for its graph page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import SupportsFloat

from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.versions_pb2 import VersionDef
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from millrace.errors import GraphError, RunDirectoryError
from millrace.train.metrics import read_scalar

# torch's names of dtypes → the names on TensorBoard's graph page.
_DTYPES = {
    "float64": "DT_DOUBLE",
    "float32": "DT_FLOAT",
    "float16": "DT_HALF",
    "bfloat16": "DT_BFLOAT16",
    "int64": "DT_INT64",
    "int32": "DT_INT32",
    "int16": "DT_INT16",
    "int8": "DT_INT8",
    "uint8": "DT_UINT8",
    "bool": "DT_BOOL",
    "complex64": "DT_COMPLEX64",
    "complex128": "DT_COMPLEX128",
}
_DEVICE_TYPES = {"cpu": "CPU", "cuda": "GPU", "mps": "GPU", "xla": "TPU"}


@dataclass(frozen=True)
class NodeView:
    """One node of a graph, as TensorBoard's graph page is to show it."""

    name: str  # unique in the graph
    op: str
    inputs: tuple[str, ...] = ()  # names of nodes
    scope: str = ""  # "encoder.layers.0", or with slashes: the boxes to nest it in
    phase: str = "forward"  # other phases get a box of their own around their scopes
    shape: tuple[int, ...] | None = None
    dtype: str | None = None  # "float32" or "torch.float32"
    device: str | None = None  # "cpu", "cuda:1", a cluster's "/host:0/gpu:1", or a full "/job:…/device:GPU:0"


class EventWriter:
    """Writes one event file into a directory that TensorBoard watches.

    Every call hands its event to the kernel before it returns, so a kill loses none. Writing here, without the thread
    of TensorBoard's own writer, also keeps that from importing TensorFlow where it is installed.

    Args:
        directory: of the events; made where missing.
        resume_step: the step that a resumed run goes on from: TensorBoard forgets what earlier files say of later ones.
        clock: seconds since the epoch.

    Raises:
        RunDirectoryError: it cannot be written.
    """

    def __init__(self, directory: Path, resume_step: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # TensorBoard reads the files of a directory in the order of their names: nanoseconds keep that of sessions.
        now_ns = time.time_ns()
        name = f"events.out.tfevents.{now_ns // 10**9:010d}.{now_ns % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(open(self._path, "ab"))  # noqa: SIM115 (closed in close)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self._write(Event(wall_time=clock(), file_version="brain.Event:2"))
        if resume_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=clock(), step=resume_step + 1, session_log=restart))

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Add a point to each named curve; names with a slash share a section. Tensors are read here."""
        points = [Summary.Value(tag=tag, simple_value=read_scalar(value)) for tag, value in values.items()]
        self._write(Event(wall_time=self._clock(), step=step, summary=Summary(value=points)))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text (Markdown) on the text page."""
        tensor = TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
        summary_metadata = text_metadata.create_summary_metadata(display_name=tag, description="")
        value = Summary.Value(tag=tag, metadata=summary_metadata, tensor=tensor)
        self._write(Event(wall_time=self._clock(), step=step, summary=Summary(value=[value])))

    def hparams(self, settings: Mapping[str, object]) -> None:
        """Show the settings on the hyperparameter page, which compares runs; inner dicts get dotted names."""
        start = SessionStartInfo(start_time_secs=self._clock())
        for name, setting in _flat(settings):
            if isinstance(setting, bool):
                start.hparams[name].bool_value = setting
            elif isinstance(setting, (int, float)):
                start.hparams[name].number_value = setting
            else:
                start.hparams[name].string_value = setting if isinstance(setting, str) else json.dumps(setting)
        value = Summary.Value(
            tag=hparams_metadata.SESSION_START_INFO_TAG,
            metadata=hparams_metadata.create_summary_metadata(HParamsPluginData(session_start_info=start)),
            tensor=hparams_metadata.NULL_TENSOR,
        )
        self._write(Event(wall_time=self._clock(), summary=Summary(value=[value])))

    def graph(self, nodes: Iterable[NodeView]) -> None:
        """Show a graph on the graph page (see `graph_event`)."""
        self._write(Event(wall_time=self._clock(), graph_def=graph_event(nodes).SerializeToString()))

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        with contextlib.suppress(OSError):  # of what could not be written, the call that wrote it has told
            self._records.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, event: Event) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error


def graph_event(nodes: Iterable[NodeView]) -> GraphDef:
    """The graph in TensorBoard's own form.

    A node's name becomes the path "scope/sub/name", and "backward/scope/sub/name" in another phase than forward, so
    that the page nests the boxes and shows the phases apart: one box with a module's forward and backward nodes
    would have edges both ways to each neighbour.

    Args:
        nodes: in any order.

    Returns:
        A GraphDef: per node its inputs, device (the page colours by it), `_output_shapes` (shown on the edges),
        `dtype` and `phase`.

    Raises:
        GraphError: two nodes have one name, or an input names none.
    """
    views = list(nodes)
    paths: dict[str, str] = {}
    taken: set[str] = set()
    for view in views:
        if view.name in paths:
            raise GraphError(f"Two nodes of the graph are called {view.name!r}: names must be unique.")
        paths[view.name] = _free_path(_path(view), taken)
        taken.add(paths[view.name])
    return GraphDef(node=[_node_def(view, paths) for view in views], versions=VersionDef(producer=22))


def _node_def(view: NodeView, paths: Mapping[str, str]) -> NodeDef:
    for name in view.inputs:
        if name not in paths:
            raise GraphError(f"Node {view.name!r} has the input {name!r}, which is no node of the graph.")
    attributes = {"phase": AttrValue(s=view.phase.encode())}
    if view.shape is not None:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in view.shape])
        attributes["_output_shapes"] = AttrValue(list=AttrValue.ListValue(shape=[shape]))
    if view.dtype is not None:
        name = view.dtype.removeprefix("torch.")
        known = _DTYPES.get(name)
        attributes["dtype"] = AttrValue(type=types_pb2.DataType.Value(known)) if known else AttrValue(s=name.encode())
    return NodeDef(
        name=paths[view.name],
        op=view.op,
        input=[paths[name] for name in view.inputs],
        device=_device_path(view.device),
        attr=attributes,
    )


def _path(view: NodeView) -> str:
    scopes = [part for part in re.split(r"[./]", view.scope) if part]
    if view.phase != "forward":
        scopes.insert(0, view.phase)
    # ":" would end a name and "^" begin a control edge; "/" in a name would open a box.
    return "/".join(re.sub(r"[^\w.-]", "_", part, flags=re.ASCII) for part in [*scopes, view.name])


def _free_path(path: str, taken: set[str]) -> str:
    free, number = path, 1
    while free in taken:
        free, number = f"{path}_{number}", number + 1
    return free


def _device_path(device: str | None) -> str:
    """The form that the page finds devices by: it looks for "/device:TYPE:number" at the end."""
    if device is None or "/device:" in device:
        return device or ""
    host, _, name = device.rpartition("/")
    kind, _, index = name.partition(":")
    return f"{host}/device:{_DEVICE_TYPES.get(kind, kind.upper())}:{index or 0}"


def _flat(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, setting in settings.items():
        if isinstance(setting, Mapping):
            pairs += _flat(setting, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, setting))
    return pairs


def _cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"Cannot write events for TensorBoard to {path}: {error.strerror}. Free some space or permit writing there."
    )
