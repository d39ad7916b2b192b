"""Training over two devices with narrowed edges: the same bits where the code is exact, near where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.graph.graph import Graph
from millrace.graph.scopes import scope_of
from millrace.graph.training import training_graph
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.place.cluster import Device
from millrace.place.wire import INT8_BLOCK
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.thread_workers import ThreadWorkers
from millrace.runtime.timeline import measured_spans
from millrace.runtime.wire_bytes import WireBytes
from millrace.runtime.workers import ProcessWorkers, Workers

NAMES = ("/host:0/cpu:0", "/host:0/cpu:1")
STEPS = 20


def halves(graph: Graph) -> list[Piece]:
    """The first two layers on the first device, the others on the second."""
    return greedy_pieces(
        graph, {node.name: NAMES[0 if scope_of(node).split(".")[0] in ("0", "1") else 1] for node in graph.nodes}
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 20, generator=generator)
    return inputs, (inputs[:, :5].sum(-1) > 0).long()


def relu_net() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 2))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    return training_graph(model, loss, torch.optim.AdamW(model.parameters(), lr=0.003), batch(0))


def train(
    wire: Any, workers: Workers | None = None, **settings: Any
) -> tuple[list[float], Mapping[str, Tensor], WireBytes]:
    """The losses, the variables at the end, and what the last step sent."""
    workers = workers or ThreadWorkers(NAMES)
    graph = relu_net()
    with PlacedSession(
        graph, halves, workers, {n: t.clone() for n, t in graph.initial.items()}, compile="eager", wire=wire, **settings
    ) as session:
        assert session.wire_bytes().edges == ()
        losses = [float(session.run(["train", "loss"], batch(seed))[1]) for seed in range(STEPS)]
        return losses, session.read_all(), session.wire_bytes()


def of_hidden(sent: WireBytes) -> list[tuple[str | None, int, int]]:
    """The edges with activations of, or gradients for, the cut: (codec, bytes sent, bytes of the tensor)."""
    return [(one.edge.codec, one.sent_bytes, one.whole_bytes) for one in sent.edges if one.edge.spec.shape == (64, 300)]


HIDDEN = 64 * 300


def test_nothing_is_narrowed_by_itself() -> None:
    _, _, sent = train(None)
    assert sent.narrowed == ()
    assert sent.sent_bytes == sent.whole_bytes
    assert of_hidden(sent) == [(None, 4 * HIDDEN, 4 * HIDDEN)] * 2
    assert "none of them narrowed" in str(sent)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_zeros_trains_the_same_bits_and_sends_less(microbatches: int) -> None:
    losses, variables, plain = train(None, microbatches=microbatches)
    said: list[str] = []
    exact_losses, exact_variables, sent = train("zeros", microbatches=microbatches, say=said.append)
    assert exact_losses == losses
    for name, value in variables.items():
        assert torch.equal(value, exact_variables[name]), name
    assert sent.whole_bytes == plain.sent_bytes
    relus = [one for one in sent.narrowed if "relu" in one.edge.value]
    assert len(relus) == microbatches
    for one in relus:  # about half are zeros
        assert 0.4 * one.whole_bytes < one.sent_bytes < 0.75 * one.whole_bytes
    assert any("narrowed" in line and " instead of " in line for line in said)


# The losses fall from 0.7 to 0.3 meanwhile.
@pytest.mark.parametrize(
    ("codec", "bytes_each", "off_by"),
    [("bfloat16", 2 * HIDDEN, 0.003), ("int8", HIDDEN + 4 * HIDDEN // INT8_BLOCK, 0.01)],
)
def test_lossy_codes_train_nearly_as_well_with_fewer_bytes(codec: str, bytes_each: int, off_by: float) -> None:
    losses, _, _ = train(None)
    lossy, _, sent = train(codec)
    assert lossy != losses
    assert max(abs(a - b) for a, b in zip(lossy, losses, strict=True)) < off_by
    assert lossy[-1] < 0.6 * lossy[0]
    assert of_hidden(sent) == [(codec, bytes_each, 4 * HIDDEN)] * 2


def test_edges_are_chosen_by_module_and_worker_processes_do_the_same() -> None:
    wire = {"1": "zeros", "2": "int8"}
    here = train(wire)
    there = train(wire, ProcessWorkers([Device(name, "cpu", 1 << 30, {}) for name in NAMES]))
    assert there[0] == here[0]
    assert there[2] == here[2]
    for name, value in here[1].items():
        assert torch.equal(value, there[1][name]), name
    assert [codec for codec, _, _ in of_hidden(here[2])] == ["zeros", "int8"]
    table = here[2].table().splitlines()
    assert len(table) == len(here[2].edges) + 1
    assert "int8" in table[1] + table[2]


def test_a_parameter_that_is_read_elsewhere_travels_as_it_is_unless_named() -> None:
    def apart(graph: Graph) -> list[Piece]:
        """Everything on one device, but the first layer's update and so its weight."""
        weights = [n for n in graph.nodes if n.meta["millrace"].variable == "0.weight"]
        return greedy_pieces(graph, {n.name: NAMES[int(n in weights)] for n in graph.nodes})

    def codecs_of_weight(wire: Any) -> tuple[set[str | None], Tensor, Tensor]:
        graph = relu_net()
        initial = {n: t.clone() for n, t in graph.initial.items()}
        with PlacedSession(graph, apart, ThreadWorkers(NAMES), initial, compile="eager", wire=wire) as session:
            loss = session.run(["train", "loss"], batch(0))[1]
            weight = graph.placeholders()["0.weight"].name
            codecs = {one.edge.codec for one in session.wire_bytes().edges if one.edge.value == weight}
            return codecs, loss, session.read("0.weight")

    plain, named = codecs_of_weight("int8"), codecs_of_weight({"0.weight": "int8"})
    assert (plain[0], named[0]) == ({None}, {"int8"})
    assert plain[1] != named[1]
    torch.testing.assert_close(plain[2], named[2], rtol=0, atol=0.01)  # the variable itself is not rounded


class Masked(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores > 0, -torch.inf)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "zeros"])
def test_infinities_of_a_mask_and_nan_arrive(codec: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), Masked(), nn.Softmax(-1))
    loss = lambda m, x: (m(x) * torch.arange(64.0)).sum(-1).mean()  # noqa: E731
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(64, 20))
    found = []
    for wire in (None, {"1": codec}):
        with PlacedSession(graph, halves, ThreadWorkers(NAMES), compile="eager", wire=wire) as session:
            found.append(session.run("loss", batch(0)[0]))
            assert len(session.wire_bytes().narrowed) == (wire is not None)
            assert session.run("loss", torch.full((64, 20), torch.nan)).isnan()
    if codec == "bfloat16":
        torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0)
    else:  # as it is, because of the infinities
        assert torch.equal(found[1], found[0])


def test_a_timeline_shows_what_was_sent() -> None:
    with PlacedSession(relu_net(), halves, ThreadWorkers(NAMES), compile="eager", wire="zeros") as session:
        session.watch_time = True
        session.run(["train", "loss"], batch(0))
        assert session.timeline is not None
        spans = [span for span in measured_spans(session.timeline) if span.kind == "transfer"]
        assert sum(span.size_bytes for span in spans) == session.wire_bytes().sent_bytes
        assert sum("as zeros" in span.name for span in spans) == len(session.wire_bytes().narrowed) > 0


def test_unknown_codecs_and_misspelt_modules_are_refused() -> None:
    for wire, said in (("float8", "bfloat16, int8, zeros"), ({"encoder": "int8"}, "'encoder' fits no module")):
        with pytest.raises(SettingError, match=said):
            PlacedSession(relu_net(), halves, ThreadWorkers(NAMES), compile="eager", wire=wire)
