"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata as hparams_metadata

from millrace.errors import GraphError, RunDirectoryError
from millrace.train.events import EventWriter, NodeView, graph_event

STEP = [
    NodeView("x", "placeholder", (), "", "forward", (32, 64), "torch.float32", "cpu"),
    NodeView("w", "placeholder", (), "encoder.0", "forward", (64, 10), "float32", "cuda:1"),
    NodeView("mm", "aten.mm", ("x", "w"), "encoder.0", "forward", (32, 10), "float32", "cuda:1"),
    NodeView("mm_1", "aten.mm", ("mm", "x"), "encoder.0", "backward", (64, 10), "bfloat16", "cuda:1"),
    NodeView("w_new", "aten.sub", ("w", "mm_1"), "encoder/0", "update", None, "float8_e4m3fn", None),
]


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read(directory).Scalars(tag)]


def test_scalars_and_texts_read_back(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "events") as writer:
        for step in range(3):
            writer.scalars(step, {"train/loss": torch.tensor(0.5**step), "train/rate": 2.0})
            assert curve(tmp_path / "events", "train/loss")[-1] == (step, 0.5**step)  # at once, without a flush
        writer.text("sample", "To be, or not to be", step=2)
    events = read(tmp_path / "events")
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/rate"}
    (text,) = events.Tensors("sample")
    assert text.tensor_proto.string_val == [b"To be, or not to be"]
    assert events.SummaryMetadata("sample").plugin_data.plugin_name == "text"


def test_a_resumed_run_takes_back_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    first = EventWriter(tmp_path)  # never closed: killed
    for step in range(1, 9):
        first.scalars(step, {"loss": 1.0})
    for resume_step, value in ((5, 2.0), (6, 3.0)):
        with EventWriter(tmp_path, resume_step=resume_step) as again:
            for step in range(resume_step + 1, resume_step + 4):
                again.scalars(step, {"loss": value})
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 2.0), (7, 3.0), (8, 3.0), (9, 3.0)]
    assert curve(tmp_path, "loss") == expected


def test_settings_are_hyperparameters(tmp_path: Path) -> None:
    with EventWriter(tmp_path) as writer:
        writer.hparams({"lr": 0.1, "bf16": True, "model": {"layers": 4, "name": "cnn"}, "sizes": [1, 2], "none": None})
    multiplexer = EventMultiplexer().AddRun(str(tmp_path), "run").Reload()
    content = multiplexer.SummaryMetadata("run", hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    assert shown == {
        "lr": 0.1,
        "bf16": True,
        "model.layers": 4.0,
        "model.name": "cnn",
        "sizes": "[1, 2]",
        "none": "null",
    }


def test_a_graph_reads_back_with_its_boxes_shapes_and_devices(tmp_path: Path) -> None:
    with EventWriter(tmp_path) as writer:
        writer.graph(STEP)
    nodes = {node.name: node for node in read(tmp_path).Graph().node}
    assert {name: list(node.input) for name, node in nodes.items()} == {
        "x": [],
        "encoder/0/w": [],
        "encoder/0/mm": ["x", "encoder/0/w"],
        "backward/encoder/0/mm_1": ["encoder/0/mm", "x"],
        "update/encoder/0/w_new": ["encoder/0/w", "backward/encoder/0/mm_1"],
    }
    mm = nodes["backward/encoder/0/mm_1"]
    assert (mm.op, mm.device, mm.attr["phase"].s) == ("aten.mm", "/device:GPU:1", b"backward")
    (shape,) = mm.attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [64, 10]
    assert mm.attr["dtype"].type == 14  # DT_BFLOAT16
    assert nodes["x"].device == "/device:CPU:0"
    unknown = nodes["update/encoder/0/w_new"]
    assert unknown.device == ""
    assert unknown.attr["dtype"].s == b"float8_e4m3fn"
    assert "_output_shapes" not in unknown.attr


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """A real TensorBoard on a free port; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(match[0] for line in process.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def answer(address: str, want: str) -> str:
    """What the server says once `want` is in it: it loads the files some time after it starts."""
    deadline_s = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(address, timeout=10) as response:
            text: str = response.read().decode()
        if want in text or time.monotonic() > deadline_s:
            return text
        time.sleep(0.1)


def test_tensorboards_graph_page_gets_the_graph(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "run" / "events") as writer:
        writer.graph(STEP)
    with tensorboard(tmp_path) as address:
        info = json.loads(answer(f"{address}/data/plugin/graphs/info", "run/events"))
        assert info["run/events"]["run_graph"] is True
        graph = answer(f"{address}/data/plugin/graphs/graph?run=run/events&conceptual=false", "node")
    assert re.findall(r'name: "(.*)"', graph) == [node.name for node in graph_event(STEP).node]
    assert graph.count('device: "/device:GPU:1"') == 3


names = st.text("ab_.:/^ é0", min_size=1, max_size=4)


@given(st.lists(st.tuples(names, names, st.sampled_from(["forward", "backward"])), unique_by=lambda n: n[0]), st.data())
def test_any_graph_keeps_its_nodes_and_edges(parts: list[tuple[str, str, str]], data: st.DataObject) -> None:
    known = [name for name, _, _ in parts]
    inputs = [data.draw(st.lists(st.sampled_from(known), max_size=3)) for _ in parts]
    views = [
        NodeView(name, "op", tuple(sources), scope, phase)
        for (name, scope, phase), sources in zip(parts, inputs, strict=True)
    ]
    nodes = graph_event(views).node
    path_of = dict(zip(known, (node.name for node in nodes), strict=True))
    assert len(set(path_of.values())) == len(views)
    for node, sources in zip(nodes, inputs, strict=True):
        assert list(node.input) == [path_of[source] for source in sources]
        assert not set(node.name) & set(":^ é")


def test_a_graph_that_does_not_hold_together_is_refused() -> None:
    with pytest.raises(GraphError, match="'y' has the input 'z'"):
        graph_event([NodeView("y", "op", ("z",))])
    with pytest.raises(GraphError, match="Two nodes of the graph are called 'y'"):
        graph_event([NodeView("y", "op"), NodeView("y", "op")])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="Cannot write events"):
        EventWriter(tmp_path / "file")
    writer = EventWriter(tmp_path / "events")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # as on a full disk
    try:
        with pytest.raises(RunDirectoryError, match="Free some space"):
            writer.scalars(1, {"loss": 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writing_events_needs_no_tensorflow(tmp_path: Path) -> None:
    """Where it is installed, importing it would take seconds and memory on every device."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    program = "import sys; from pathlib import Path; from millrace.train.events import *; "
    program += "EventWriter(Path(sys.argv[1])).scalars(1, {'a': 1.0})"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", program, str(tmp_path / "events")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
