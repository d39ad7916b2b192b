"""`fit` over several worker processes: the same training, saved and resumed alike; errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.small import cross_entropy, labelled, mlp
from torch import Tensor, nn

import millrace
from millrace.errors import PlacementError, SettingError, WorkerError
from millrace.place.cluster import Cluster, Device, Link
from millrace.place.cluster_file import write_cluster
from millrace.train.model import Model

QUIET: dict[str, Any] = {"compile": "eager", "progress": False, "run_dir": False}
BATCHES = [labelled(8, seed=seed) for seed in range(5)]
RATES = {"product": 1e9, "convolution": 1e9, "attention": 1e9, "memory": 1e9}
TWO = Cluster(
    tuple(Device(f"/host:0/cpu:{i}", "cpu", 1 << 30, RATES, 1e-6) for i in range(2)), (Link("*", "*", 1e-5, 1e9),)
)
APART = {"0": "cpu:0", "2": "cpu:1"}


def trained(**settings: Any) -> nn.Module:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    millrace.fit(model, BATCHES, loss=cross_entropy, optimizer=optimizer, **{"epochs": 2, **QUIET, **settings})
    return model


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_two_devices_train_as_one_does() -> None:
    expected = trained()
    same(trained(devices=TWO, placement=APART), expected)
    same(trained(devices=TWO, placement=APART, microbatches=2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_a_number_of_devices_means_workers_of_this_machine() -> None:
    same(trained(devices=2), trained())


def test_a_cluster_file_and_another_transport(tmp_path: Path) -> None:
    write_cluster(TWO, tmp_path / "two.toml")
    same(trained(devices=str(tmp_path / "two.toml"), placement=APART, transport="gloo"), trained())


@pytest.mark.gpu
@pytest.mark.parametrize("devices", ["all", ["cpu:0", "gpu:0"], ["gpu:0"]])
def test_gpus_train_as_a_cpu_does(devices: Any) -> None:
    apart = {"0": "cpu", "2": "gpu"} if "cpu:0" in devices else None
    same(trained(devices=devices, placement=apart, compile="tiered"), trained(), rtol=1e-7, atol=1e-8)


def test_tensors_are_narrowed_between_devices_when_asked() -> None:
    def run(**settings: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 3))
        data = [(torch.randn(32, 12), torch.randint(0, 3, (32,))) for _ in range(4)]
        more = {"epochs": 1, **QUIET, "devices": TWO, "placement": APART, **settings}
        millrace.fit(model, data, loss=cross_entropy, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), **more)
        return model

    plain, lossy = run(), run(wire={"1": "int8"})
    same(run(wire="zeros"), plain)
    same(lossy, plain, rtol=0, atol=0.02)
    assert not torch.equal(lossy[2].weight, plain[2].weight)


def test_validation_checkpoints_and_resuming_see_the_devices_weights(tmp_path: Path) -> None:
    def run(**settings: Any) -> nn.Module:
        return trained(validation=BATCHES[:2], run_dir=tmp_path / "run", devices=TWO, placement=APART, **settings)

    whole = trained(epochs=4, validation=BATCHES[:2])
    run(epochs=2)
    same(run(epochs=4, resume=True), whole)
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert last.name == "step-00000020"


def test_the_last_smaller_batch_is_trained_on_as_well() -> None:
    data = tuple(torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    settings: dict[str, Any] = {"loss": cross_entropy, "epochs": 1, "batch_size": 16, **QUIET}
    models = [mlp(), mlp()]
    for model, more in zip(models, ({}, {"devices": TWO, "placement": APART, "microbatches": 4}), strict=True):
        millrace.fit(model, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **settings, **more)
    same(models[0], models[1], rtol=1e-9, atol=1e-9)


class Tagger(nn.Module):
    """Two recurrent layers, scores for every step of time."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.lstm = nn.LSTM(4, 6, 2, dropout=dropout)
        self.scores = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Sentences, one a row, to scores of the same order."""
        return self.scores(self.lstm(x.transpose(0, 1))[0]).transpose(0, 1)


@pytest.mark.parametrize(
    ("dtype", "dropout", "more", "tolerance"),
    [
        (torch.float32, 0.3, {}, {"rtol": 1e-4, "atol": 1e-5}),  # the kernel
        pytest.param(  # written out
            *(torch.float64, 0.0, {"microbatches": 2}, {"rtol": 1e-9, "atol": 1e-9}), marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_recurrent_layers_train_in_chunks_of_time(
    dtype: torch.dtype, dropout: float, more: dict[str, Any], tolerance: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(3, 4, 5, 4, generator=generator).to(dtype)
    data = [(x, torch.randint(0, 3, (4, 5), generator=generator)) for x in inputs]

    def run(**settings: Any) -> nn.Module:
        model = Tagger(dropout).to(dtype)
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
        millrace.fit(model, data, loss=loss, optimizer=adam, epochs=2, **QUIET, **settings)
        return model

    layers = {"lstm.l0": "cpu:0", "lstm.l1": "cpu:1"}
    same(run(devices=TWO, placement=layers, time_chunks=3, **more), run(), **tolerance)


def wide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 3)).double()


def test_blocks_of_layers_train_on_devices_of_their_own() -> None:
    settings: dict[str, Any] = {"loss": cross_entropy, "epochs": 2, **QUIET}
    apart = {f"{layer}.block {i}": f"cpu:{i}" for layer in (0, 2) for i in range(2)}
    models = [wide(), wide()]
    more: list[dict[str, Any]] = [{}, {"devices": TWO, "placement": apart, "partitions": 2}]
    for model, extra in zip(models, more, strict=True):
        millrace.fit(model, BATCHES, optimizer=millrace.optim.adam(0.01), **settings, **extra)
    same(models[0], models[1], rtol=1e-9, atol=1e-11)


def test_a_model_of_four_partitions_trains_on_four_devices(tmp_path: Path) -> None:
    """The program of the first slide; the blocks of its layer are apart."""
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        file = tmp_path / "pictures" / str(index % 2) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 128, (8, 8), generator=generator) + 100 * (index % 2)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(file)

    def run(partitions: int, **more: Any) -> nn.Module:
        model = Model(num_partitions=partitions)
        images = model.image_input(tmp_path / "pictures", rows=8, cols=8)
        hidden = model.relu_layer(images, 256)
        model.softmax(hidden, num_classes=2, labels=images.labels)
        model.train(epochs=1, **QUIET, **more)
        return model.module

    devices = tuple(Device(f"/host:0/cpu:{i}", "cpu", 1 << 30, RATES, 1e-6) for i in range(4))
    apart = {f"*.block {i}": f"cpu:{i}" for i in range(4)}
    same(run(1), run(4, devices=Cluster(devices, TWO.links), placement=apart), rtol=1e-4, atol=1e-6)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SettingError, match="devices=2"):
        trained(microbatches=2)
    with pytest.raises(SettingError, match="devices=2"):
        trained(time_chunks=2)
    with pytest.raises(SettingError, match="devices=2"):
        trained(wire="int8")
    with pytest.raises(SettingError, match="bfloat16, int8, zeros"):
        trained(devices=TWO, wire="int4")
    with pytest.raises(SettingError, match="transport"):
        trained(transport="gloo")
    with pytest.raises(SettingError, match="Did you mean 'gloo'"):
        trained(devices=TWO, transport="glo")
    for nothing in (0, "", [], True):
        with pytest.raises(SettingError, match="how many CPU workers"):
            trained(devices=nothing)
    with pytest.raises(PlacementError, match="no 'gpu:77'"):
        trained(devices=["cpu:0", "gpu:77"])
    elsewhere = Cluster((*TWO.devices, Device("/host:1/cpu:0", "cpu", 1 << 30, RATES)), TWO.links)
    with pytest.raises(PlacementError, match=r"the devices of one machine.*/host:1"):
        trained(devices=elsewhere)
    absent = Cluster((Device("/host:0/gpu:77", "cuda", 1 << 30, RATES),))
    with pytest.raises(WorkerError, match="CUDA devices here"):
        trained(devices=absent)
    with pytest.raises(PlacementError, match="fits no module path"):
        trained(devices=TWO, placement={"encoder": "cpu:0"})


def timeline(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The spans of a trace file by the title that they are shown under, each with its row."""
    events = json.loads(path.read_text())["traceEvents"]
    titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in titles.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            found[titles[event["pid"]]].append({**event, "row": rows[event["pid"], event["tid"]]})
    return found


def test_a_run_tells_which_device_does_what(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(devices=TWO, placement=APART, microbatches=2, epochs=1, run_dir=run)
    placement = json.loads((run / "placement.json").read_text())
    assert {group: device for group, device in placement["groups"].items() if group[0] in "02"} == {
        **{group: "/host:0/cpu:0" for group in placement["groups"] if group.startswith("0")},
        **{group: "/host:0/cpu:1" for group in placement["groups"] if group.startswith("2")},
    }
    svg = ElementTree.fromstring((run / "placement.svg").read_text())
    shown = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"/host:0/cpu:0", "/host:0/cpu:1", "between devices"} <= set(shown)
    nodes = {node.name: node for node in EventAccumulator(str(run / "events")).Reload().Graph().node}
    assert {node.device for node in nodes.values()} == {"", "/host:0/device:CPU:0", "/host:0/device:CPU:1"}
    assert all(nodes[name].device.endswith("CPU:0") for name in nodes if name.startswith(("0/", "backward/0/")))
    for node in nodes.values():
        if node.op.startswith("Recv"):
            (sent,) = node.input
            assert nodes[sent].op.startswith("Send")
            assert {node.device[-5:], nodes[sent].device[-5:]} == {"CPU:0", "CPU:1"}
    assert sum(node.op.startswith("Recv") for node in nodes.values()) > 0


def test_a_step_in_the_middle_is_timed_beside_what_was_expected(tmp_path: Path) -> None:
    trained(devices=TWO, placement=APART, epochs=1, run_dir=tmp_path / "short")
    assert list(timeline(tmp_path / "short" / "timeline.json"))[1] == "measured: step 2 (eager)"
    trained(devices=TWO, placement=APART, microbatches=2, epochs=5, run_dir=tmp_path / "run")
    found = timeline(tmp_path / "run" / "timeline.json")
    assert list(found) == ["expected (eager)", "measured: step 20 (eager)"]
    expected, measured = found.values()
    for kind in ("task", "transfer"):
        names = [
            sorted((span["row"], span["name"]) for span in spans if span["cat"] == kind) for spans in found.values()
        ]
        assert names[0] == names[1] != []
    rows = {"/host:0/cpu:0", "/host:0/cpu:1", "/host:0/cpu:0 sends", "/host:0/cpu:1 sends"}
    assert {span["row"] for span in expected} == {s["row"] for s in measured if s["cat"] != "wait"} == rows
