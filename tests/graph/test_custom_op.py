"""docs/custom-ops.md, run as it stands: an own operator is traced, differentiated, compiled around and saved."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from millrace import Session
from millrace.graph import info, load_graph, save_graph, training_graph
from millrace.graph.graph import Graph
from millrace.graph.signature import Phase

from .against_eager import Runner, match_eager, training

DOCUMENT = Path(__file__).parents[2] / "docs" / "custom-ops.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def document() -> tuple[dict[str, Any], str]:
    """The document's programs, run one after the other in one namespace; and what they print."""
    space: dict[str, Any] = {"__name__": "document"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for program in PROGRAMS:
            exec(compile(program, str(DOCUMENT), "exec"), space)
    return space, printed.getvalue()


def operators(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


def own_loss(space: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return space["Net"](), space["loss"]


def test_the_operator_takes_about_fifteen_lines() -> None:
    body = PROGRAMS[0].partition("@torch.library")[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


def test_the_document_prints_what_it_shows_and_learns(document: tuple[dict[str, Any], str]) -> None:
    _, printed = document
    shown = re.search(r"^```text\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    lines = [line for line in shown[1].splitlines() if line.strip() not in ("", "…")]
    assert lines
    for line in lines:
        assert line in printed, f"the document shows a line that its program does not print: {line}"
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_five_steps_agree_with_eager(document: tuple[dict[str, Any], str]) -> None:
    space, _ = document
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)) for _ in range(3)]
    runner = match_eager(*training(space["Net"], space["loss"]), batches)
    assert operators(runner.graph).count("mine.soft_sign.default") == 1


def test_its_gradient_is_made_of_backward_nodes_in_its_module(document: tuple[dict[str, Any], str]) -> None:
    space, _ = document
    nodes = {str(node.target): node for node in space["graph"].nodes}
    forward = info(nodes["mine.soft_sign.default"])
    backward = [info(n) for n in space["graph"].nodes if info(n).line == forward.line and n.target is not forward]
    assert forward.phase is Phase.FORWARD
    assert Phase.BACKWARD in {origin.phase for origin in backward}
    assert "custom-ops.md" in forward.line


def test_gradient_and_registration_are_sound(document: tuple[dict[str, Any], str]) -> None:
    space, _ = document
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(space["soft_sign"], (x,))
    # As the document says.
    torch.library.opcheck(space["soft_sign"], (x,), test_utils=("test_schema", "test_faketensor"))


def test_each_device_has_its_kernel(document: tuple[dict[str, Any], str]) -> None:
    operator = torch.ops.mine.soft_sign.default
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_other_kernel_runs(document: tuple[dict[str, Any], str]) -> None:
    space, _ = document
    model, loss = own_loss(space)
    batch = (torch.randn(8, 4), torch.randn(8, 1))
    other = own_loss(space)[0].cuda()
    on_gpu = (batch[0].cuda(), batch[1].cuda())
    first = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    second = training_graph(other, loss, torch.optim.SGD(other.parameters(), lr=0.1), on_gpu)
    torch.testing.assert_close(Runner(first).step(batch)["loss"], Runner(second).step(on_gpu)["loss"].cpu())


def test_a_saved_graph_names_it(document: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    space, _ = document
    graph = space["graph"]
    save_graph(graph, tmp_path / "graph")
    loaded = load_graph(tmp_path / "graph").with_(initial=graph.initial)
    assert operators(loaded) == operators(graph)
    expected, got = Runner(graph).step(space["batch"]), Runner(loaded).step(space["batch"])
    assert torch.equal(got["loss"], expected["loss"])


@pytest.mark.parametrize("tier", ["eager", "inductor", pytest.param("tiered", marks=pytest.mark.long)])
def test_each_tier_runs_it(document: tuple[dict[str, Any], str], tier: str) -> None:
    space, _ = document
    model, loss = own_loss(space)
    reference = own_loss(space)[0]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    batch = (torch.randn(8, 4), torch.randn(8, 1))
    said: list[str] = []
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    session = Session(graph, compile=tier, say=said.append)
    for step in range(3):
        if step == 1:
            session.tier(["train", "loss"], batch, wait=True)  # the next call swaps in what was compiled
        _, got = session.run(["train", "loss"], batch)
        expected = loss(reference, batch)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-6)
    assert session.last_tier == ("eager" if tier == "eager" else "inductor"), said
