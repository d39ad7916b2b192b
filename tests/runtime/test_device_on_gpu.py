"""A device that is a GPU, with tensors that say they are on one: what is copied where. With a GPU: what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from millrace.errors import PlacementError, SettingError, StepError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.scopes import scope_of
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.partition.program import Partition
from millrace.place.cluster import Device
from millrace.runtime.device import DeviceRunner
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.thread_workers import ThreadWorkers
from millrace.runtime.workers import ProcessWorkers

CPU, GPU = "/host:0/cpu:0", "/host:0/gpu:0"
CUDA = torch.device("cuda:0")
SOON_S = 60.0


class Model(nn.Module):
    """Embedding, attention, dropout and a linear layer; what a GPU and a CPU have kernels of their own for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        heads = self.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.out(F.dropout(y.transpose(1, 2).flatten(2) + x, 0.1))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (4, 6), generator=generator), torch.randint(0, 11, (4, 6), generator=generator)


def step_graph() -> Graph:
    torch.manual_seed(0)
    model = Model().double()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = model(batch[0])
        return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten()), {"scores": scores}

    return training_graph(model, loss, torch.optim.AdamW(model.parameters(), lr=0.01), batch())


def embedding_on_the_cpu(graph: Graph) -> list[Piece]:
    return greedy_pieces(graph, {n.name: CPU if scope_of(n).startswith("embed") else GPU for n in graph.nodes})


class Line:
    """Gives what is to be received in host memory, and looks at what is sent."""

    def __init__(self, partition: Partition, sender: torch.device) -> None:
        self._edges, self._sender = partition.edges, sender
        self.sent: list[int] = []
        self.received: list[int] = []

    def send(self, edge: int, tensor: Tensor) -> None:
        assert tensor.device == self._sender
        assert self._edges[edge].spec.fits(tensor)
        self.sent.append(edge)

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        self.received.append(edge)
        return torch.empty(self._edges[edge].spec.shape, dtype=self._edges[edge].spec.dtype)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_everything_is_computed_on_the_gpu_and_handed_over_from_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors refuse to be mixed over devices, as real ones do."""
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    graph = step_graph()
    graph = prune(graph, ["loss", "scores"], graph.updates)
    partition = cut(graph, embedding_on_the_cpu(graph))
    program = partition.programs[device]
    with FakeTensorMode(allow_non_fake_inputs=True):
        variables = {v.name: torch.empty(v.spec.shape, dtype=v.spec.dtype, device=CUDA) for v in program.variables}
        runner = DeviceRunner(program, partition.edges, variables, device=CUDA)
        feeds = {
            f"feed:{f.name}": torch.zeros(f.spec.shape, dtype=f.spec.dtype)
            for f in graph.feeds
            if f"feed:{f.name}" in program.feeds
        }
        line = Line(partition, CUDA)
        times: list[int] = []
        fetched = runner.step(feeds, line, SOON_S, lambda _: times.append(len(waits)))
    assert line.sent == [e.number for e in partition.edges if e.source == device]
    assert sorted(line.received) == [e.number for e in partition.edges if e.target == device]
    assert set(fetched) == set(program.fetches)
    assert all(value.device.type == "cpu" for value in fetched.values())
    assert waits == [CUDA], "a step is over when the GPU is done, and waits for it nowhere else"
    assert set(times) == {0}
    assert all(value.device == CUDA for value in variables.values())


def test_which_gpu_a_device_is() -> None:
    assert Device("/host:3/gpu:2", "cuda", 1, {}).torch_device == "cuda:2"
    assert Device("/host:3/cpu:2", "cpu", 1, {}).torch_device == "cpu"
    with pytest.raises(PlacementError, match="does not say which one"):
        _ = Device("/host:0/fast", "cuda", 1, {}).torch_device


def test_a_gpu_that_is_not_there_is_refused_by_its_worker() -> None:
    with pytest.raises(WorkerError, match=r"gpu:99 is to run on cuda:99, but PyTorch .* sees \d+ CUDA devices"):
        ProcessWorkers([Device("/host:0/gpu:99", "cuda", 1 << 30, {})])


def test_a_step_that_was_traced_on_another_device_is_refused() -> None:
    graph = step_graph()
    elsewhere = [replace(v, spec=replace(v.spec, device="cuda:0")) for v in graph.variables]
    workers = ThreadWorkers([CPU, GPU])
    with pytest.raises(SettingError, match=r"on cuda:0\. Leave the model"):
        PlacedSession(graph.with_(variables=tuple(elsewhere)), embedding_on_the_cpu, workers)
    workers.close()


# -- with a GPU ------------------------------------------------------------------------------------------------------

DEVICES = [Device(CPU, "cpu", 1 << 30, {}), Device(GPU, "cuda", 2 << 30, {})]


@pytest.fixture
def workers() -> Iterator[ProcessWorkers]:
    made = ProcessWorkers(DEVICES)
    yield made
    made.close()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["eager", "inductor"])
@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_a_cpu_and_a_gpu_train_as_one_cpu_does(workers: ProcessWorkers, compile: str, transport: str) -> None:
    graph = step_graph()
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(
        graph, embedding_on_the_cpu, workers, compile=compile, transport=transport, timeout_s=600.0
    ) as placed:
        for seed in range(4):
            names = ["train", "loss", "scores"]
            got, expected = placed.run(names, batch(seed)), whole.run(names, batch(seed))
            torch.testing.assert_close(got[1:], expected[1:], rtol=1e-9, atol=1e-9)
            assert all(value.device.type == "cpu" for value in got[1:])
        for name, value in placed.read_all().items():
            torch.testing.assert_close(value, whole.variables[name], rtol=1e-7, atol=1e-9, msg=name)
        smaller = tuple(t[:3] for t in batch(5))
        got, expected = placed.run(["train", "loss"], smaller), whole.run(["train", "loss"], smaller)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-9)
        placed.assign("out.bias", torch.zeros(11))
        assert torch.equal(placed.read("out.bias"), torch.zeros(11).double())


@pytest.mark.gpu
def test_times_are_of_what_the_gpu_did(workers: ProcessWorkers) -> None:
    with PlacedSession(step_graph(), embedding_on_the_cpu, workers, compile="eager", timeout_s=SOON_S) as placed:
        placed.watch_time = True
        placed.run(["train", "loss"], batch())
        assert placed.timeline is not None
        for device, times in placed.timeline.times.items():
            assert len(times) == len(placed.timeline.partition.programs[device].instructions) + 1
            assert times == sorted(times)


@pytest.mark.gpu
def test_a_gpu_worker_is_held_to_its_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 4), nn.Linear(4, 4))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) @ torch.zeros(4, 1 << 26)).sum()  # 64 * 2^26 * 4 bytes: 16 GiB

    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (torch.arange(64), torch.zeros(1)))
    made = ProcessWorkers([Device(GPU, "cuda", 1 << 30, {})], hold_to_memory=True)
    placed = PlacedSession(
        graph, lambda g: greedy_pieces(g, {n.name: GPU for n in g.nodes}), made, compile="eager", timeout_s=SOON_S
    )
    with pytest.raises(StepError, match=r"gpu:0.*[Mm]emory"):
        placed.run(["train", "loss"], (torch.arange(64), torch.zeros(1)))
