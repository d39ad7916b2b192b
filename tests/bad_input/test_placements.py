"""Models that fit nowhere, wishes and clusters that cannot be, steps of one node: refused with what helps, or run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.partition.test_cut import same
from tests.small import cross_entropy, labelled, mlp
from torch import nn

import millrace
from millrace.cli.main import main
from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.split import split
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.placed import Planner, pieces_of
from millrace.place.algorithms.registry import ALGORITHMS
from millrace.place.cluster import Cluster, Device, Link
from millrace.place.placement import place
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.thread_workers import ThreadWorkers

RATES = {"product": 1e9, "convolution": 1e9, "attention": 1e9, "memory": 1e9}
MB = 10**6


def cluster(*memory_bytes: int) -> Cluster:
    devices = tuple(Device(f"/host:0/cpu:{i}", "cpu", size, RATES, 1e-6) for i, size in enumerate(memory_bytes))
    return Cluster(devices, (Link("*", "*", 1e-5, 1e9),))


def step(*widths: int, batch: int = 8) -> Graph:
    """A perceptron that exists in shape only."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, device="meta") for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers)
    data = (torch.zeros(batch, widths[0], device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), sgd, data)
    return prune(graph, ["loss"], graph.updates)


def refusal(graph: Graph, devices: Cluster, **settings: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        place(graph, devices, budget_s=0.3, **settings)
    return str(caught.value)


def in_bytes(text: str, pattern: str) -> float:
    """The size that a message has at the place of "(SIZE)" in a pattern."""
    found = re.search(pattern.replace("(SIZE)", r"([\d.e+]+) (GB|MB|kB|bytes)"), text)
    assert found, text
    return float(found[1]) * {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0}[found[2]]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_variables_that_exceed_all_memory_are_told_by_how_much_and_as_much_more_helps() -> None:
    graph = step(*[1000] * 6)  # five layers of 4 MB
    said = refusal(graph, cluster(5 * MB, 5 * MB))
    size = sum(v.spec.size_bytes for v in graph.variables)
    lacking = in_bytes(said, r"Variables alone exceed all memory by (SIZE): add devices that hold as much")
    assert lacking == pytest.approx(size - 0.9 * 10 * MB, rel=0.01)
    assert in_bytes(said, r"/host:0/cpu:[01] needs (SIZE)") > in_bytes(said, r"and may use (SIZE)")
    assert place(graph, cluster(5 * MB, 5 * MB, 4 * int(lacking)), budget_s=0.3).expected.fits


def test_a_layer_too_large_for_every_device_is_named_and_fits_when_it_is_split() -> None:
    graph = step(64, 8000, 1024)  # the second layer has 33 MB of weights
    small = cluster(*[30 * MB] * 4)
    lacking = in_bytes(refusal(graph, small), r"The group '1' alone has (SIZE) of variables: no device is large enough")
    assert lacking == pytest.approx(4 * 8001 * 1024, rel=0.01)
    assert place(split(graph, 8), small, budget_s=0.5).expected.fits


def test_a_batch_too_large_fits_with_more_microbatches() -> None:
    graph = step(64, 512, 512, 512, 8, batch=20_000)
    small = cluster(60 * MB, 60 * MB)
    assert "Use more microbatches or a smaller batch" in refusal(graph, small)
    assert place(microbatch(graph, 50), small, budget_s=1.0).expected.fits


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.toml"
    file.write_text(
        '[[device]]\nname = "/host:0/gpu:[0-1]"\nlike = "t4"\nmemory_bytes = 1000\n'
        '[[link]]\nsource = "*"\ntarget = "*"\nlatency_s = 0\nbytes_per_s = 1e9\n'
    )
    assert main(["place", "digits", "--cluster", str(file), "--budget", "0.2"]) == 1
    said = capsys.readouterr().err
    assert "Lacking in all" in said
    assert "Traceback" not in said
    file.write_text(file.read_text().replace("bytes_per_s = 1e9", "bytes_per_s = -1e9"))
    assert main(["place", "digits", "--cluster", str(file)]) == 1
    said = capsys.readouterr().err
    assert f"{file}: link 1: bytes_per_s: expected a number above 0, got -1000000000.0" in said
    assert "Traceback" not in said


# -- clusters and wishes ----------------------------------------------------------------------------------------------


def test_clusters_that_lack_something_are_refused() -> None:
    graph = step(8, 8, 8)
    assert "the cluster has no devices" in refusal(graph, Cluster(()))
    said = refusal(graph, Cluster(cluster(MB, MB).devices, (Link("/host:0/cpu:0", "/host:0/cpu:1", 0.0, 1e9),)))
    assert "no link leads from /host:0/cpu:1 to /host:0/cpu:0" in said


def test_a_run_whose_wishes_contradict_is_refused_before_it_begins(tmp_path: Path) -> None:
    model, data = mlp(), [labelled(8)]
    wishes = {"0": "cpu:0", "*": "cpu:1"}
    with pytest.raises(
        PlacementError, match=r"'0' matches '0', which is to be on cpu:0; .*'0' matches '\*'.* on cpu:1"
    ):
        millrace.fit(
            model, data, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1,
            devices=cluster(10**9, 10**9), placement=wishes, run_dir=tmp_path / "run", compile="eager", progress=False,
        )  # fmt: skip
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


# -- one node ---------------------------------------------------------------------------------------------------------


def doubling() -> Graph:
    def double(v: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
        v["w"] = v["w"] * x
        return {"x": x, "kept": v["kept"]}

    return millrace.trace(double, {"w": torch.ones(3), "kept": torch.arange(4.0)}, torch.full((3,), 2.0))


@pytest.mark.parametrize("search", sorted(ALGORITHMS))
def test_a_step_of_one_node_is_placed_and_runs(search: str) -> None:
    graph = doubling()
    assert len(graph.nodes) == 1
    placement = place(graph, cluster(MB, MB, MB), search=search, budget_s=0.2)
    same(graph, cut(graph, pieces_of(placement), placement.homes))


@pytest.mark.parametrize("search", sorted(ALGORITHMS))
def test_one_giant_node_among_small_ones_is_placed_or_refused_with_its_size(search: str) -> None:
    torch.manual_seed(0)
    w = {"small": torch.randn(4, 4), "giant": torch.randn(2000, 2000)}

    def giant(v: dict[str, Any], x: torch.Tensor) -> Any:
        result = (x @ v["small"]).sum() * (v["giant"] @ v["giant"])
        v["small"] = v["small"] - 0.1
        return result.sum()

    graph = millrace.trace(giant, w, torch.randn(2, 4))
    quick = Device("/host:0/cpu:1", "cpu", 10**9, dict.fromkeys(RATES, 1e12))
    fast = Cluster((*cluster(10**9).devices, quick), cluster(1).links)
    placement = place(graph, fast, search=search, budget_s=0.2)
    same(graph, cut(graph, pieces_of(placement), placement.homes))
    assert "Lacking in all" in refusal(graph, cluster(20 * MB, 20 * MB), search=search)


def test_a_step_without_a_node_is_refused_and_a_fetch_without_one_is_not() -> None:
    nothing = millrace.trace(lambda v, x: {"x": x}, {}, torch.ones(2))
    assert "the graph computes nothing" in refusal(nothing, cluster(MB))
    two = cluster(MB, MB)
    planner = Planner(lambda graph: place(graph, two, budget_s=0.1))
    workers = ThreadWorkers([device.name for device in two.devices])
    with PlacedSession(doubling(), planner, workers, compile="eager", timeout_s=20.0) as session:
        feed = torch.full((3,), 2.0)
        session.run(["train"], feed)
        got = session.run(["x", "kept"], feed)
        assert torch.equal(got[0], feed)
        assert torch.equal(got[1], torch.arange(4.0))
        assert torch.equal(session.run("kept"), torch.arange(4.0))
        assert torch.equal(session.read("w"), feed)
