"""The benchmarks: turns, ratios, figures, tables and results as pure logic; a worker that fails; one real small run."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.catalogue import EAGER, EAGER_FUSED, FIT, MILLRACE, OURS, PeerSpec, millrace_in_one_call, select, step_peers
from bench.figures import disagreeing, first_step_figure, memory_of, paired_ratio, rounded, spread, step_figure
from bench.first_step import first_steps
from bench.race import Race, Samples, Settings, race, turns
from bench.readme import BEGIN, END, between, markdown, plain, section, tables
from bench.worker import PeerError, Worker
from bench.workloads import PRECISIONS, STANDARD, WORKLOADS
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import protocol, results

SECONDS = st.floats(1e-6, 1e3)
MEMORY = {"baseline_bytes": 100, "start_peak_bytes": 180, "steps_peak_bytes": 150, "device_peak_bytes": 0}


# -- turns and ratios ----------------------------------------------------------------------------------------------


def test_turns_are_taken_in_rotation() -> None:
    assert [turns("ABC", number) for number in range(4)] == [list("ABC"), list("BCA"), list("CAB"), list("ABC")]


@given(st.lists(st.text(), unique=True, max_size=9), st.integers(0, 50))
def test_everybody_has_one_turn_in_a_round_and_is_first_once_in_a_cycle(names: list[str], start: int) -> None:
    rounds = [turns(names, start + number) for number in range(len(names))]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(names)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=15))
def test_a_machine_that_is_slow_in_some_rounds_does_not_change_the_ratio(rounds: list[tuple[float, ...]]) -> None:
    quiet = paired_ratio([a for a, _, _ in rounds], [b for _, b, _ in rounds])
    loaded = paired_ratio([a * slow for a, _, slow in rounds], [b * slow for _, b, slow in rounds])
    assert loaded == pytest.approx(quiet)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=15).filter(lambda pairs: len(pairs) % 2 == 1))
def test_the_ratio_the_other_way_round_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]
    assert paired_ratio(theirs, ours)["median"] == pytest.approx(1 / paired_ratio(ours, theirs)["median"])


@given(st.lists(SECONDS, min_size=1))
def test_the_median_lies_between_the_quartiles(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found["low"] <= found["median"] <= found["high"] <= max(values)
    assert found["median"] == pytest.approx(statistics.median(values))


def test_a_ratio_needs_a_partner_in_every_round() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])
    assert math.isnan(spread([])["median"])


@given(st.integers(1, 20), st.floats(1e-4, 2.0), st.floats(0.01, 1.0))
def test_calibration_finds_whole_calls_that_fill_a_turn(per_call: int, step_s: float, turn_s: float) -> None:
    now_s = [0.0]

    def run(steps: int) -> float:
        assert steps % per_call == 0
        now_s[0] += steps * step_s
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol.time, "perf_counter", lambda: now_s[0])
        steps = protocol.calibrate(protocol.Peer(run, float, {}, steps_per_call=per_call), turn_s)
    assert steps % per_call == 0
    assert steps == per_call or abs(steps * step_s - turn_s) <= per_call * step_s / 2 * 1.001


# -- figures -------------------------------------------------------------------------------------------------------


def sample(spec: PeerSpec, seconds: list[float], loss: float = 2.0) -> Samples:
    return Samples(spec, {"loss": loss, "steps": 16, "versions": {"torch": "2"}}, seconds, MEMORY)


def raced(*samples: Samples, failed: dict[str, str] | None = None) -> Race:
    return Race(WORKLOADS["mlp"], "float32", Settings(Path()), {s.spec.name: s for s in samples}, failed or {})


def test_a_step_figure_compares_with_the_fastest_variant_of_a_peer() -> None:
    slow, fast = sample(EAGER, [4.0, 4.0, 4.0]), sample(EAGER_FUSED, [3.0, 2.0, 9.0])
    figure = step_figure(raced(slow, fast, sample(MILLRACE, [1.0, 1.0, 1.0])))
    assert figure["ratios"]["millrace"]["eager"] == {"median": 3.0, "low": 2.5, "high": 6.0, "variant": "eager_fused"}
    assert list(figure["ratios"]["millrace"]) == ["eager"]


def test_one_step_per_call_is_not_compared_with_many() -> None:
    one = PeerSpec("jax", "jax", "jax.jit", "jax_jit", {"steps_per_call": 1})
    many = PeerSpec("jax_x16", "jax", "jax.jit", "jax_jit", {"steps_per_call": 16})
    both = [sample(one, [8.0]), sample(many, [2.0]), sample(MILLRACE, [4.0]), sample(millrace_in_one_call(16), [1.0])]
    ratios = step_figure(raced(*both))["ratios"]
    assert (ratios["millrace"]["jax"]["variant"], ratios["millrace"]["jax"]["median"]) == ("jax", 2.0)
    assert (ratios["millrace_x16"]["jax"]["variant"], ratios["millrace_x16"]["jax"]["median"]) == ("jax_x16", 2.0)


def test_losses_agree_with_eager_within_the_tolerance_of_the_precision() -> None:
    losses = {"other": 2.001, "eager": 2.0, "far": 2.01, "broken": math.nan}
    assert disagreeing(losses, "float32") == ["broken", "far"]
    assert disagreeing(losses, "bfloat16") == ["broken"]
    assert disagreeing({"a": 1.0, "b": 2.0}, "float32") == ["b"]
    assert disagreeing({}, "float32") == []


def test_memory_is_what_stepping_adds_to_the_imports() -> None:
    assert memory_of(MEMORY) == {"steps_bytes": 50, "start_bytes": 80, "total_bytes": 150}
    assert memory_of({**MEMORY, "device_peak_bytes": 7})["steps_bytes"] == 7
    assert memory_of({}) == {}


def test_figures_survive_json() -> None:
    figure = rounded(step_figure(raced(sample(EAGER, [1 / 3]), sample(MILLRACE, [1.0]), failed={"jax": "ended"})))
    assert json.loads(json.dumps(figure)) == figure
    assert figure["ratios"]["millrace"]["eager"]["median"] == 0.33333
    assert figure["failed"] == {"jax": "ended"}


# -- tables --------------------------------------------------------------------------------------------------------


def figures(loss: float = 2.0) -> list[dict[str, Any]]:
    found = raced(sample(EAGER, [3.0, 4.0, 5.0]), sample(MILLRACE, [2.0, 2.0, 2.0], loss))
    both = [step_figure(found), first_step_figure(found)]
    return [{**figure, "date": "2026-01-02T03:04:05+00:00"} for figure in both]


def test_the_section_says_what_was_measured_where_and_when() -> None:
    text = section([{"machine": {"name": "a quick box"}, "figures": figures()}])
    assert "| tiny MLP 64-128-10, batch 64, SGD | float32 | 2.00× (1.75-2.25) |" in text
    assert "a quick box, 2 thread(s), 2026-01-02, with torch 2." in text
    assert "The losses of all peers agree." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines
    assert all(line.count(" | ") >= 1 for line in lines)


def test_the_section_says_when_losses_disagree() -> None:
    text = section([{"machine": {"name": "a quick box"}, "figures": figures(loss=2.5)}])
    assert "Losses disagree" in text
    assert "step/mlp/float32 (millrace)" in text


def test_tables_without_figures_are_left_out() -> None:
    assert tables([], plain) == ""
    assert "first step" not in tables(figures()[:1], plain)


def test_tables_have_as_many_cells_in_every_row() -> None:
    rows = [["model", "eager"], ["a longer name", "1"]]
    assert markdown(rows) == "| model | eager |\n| --- | --- |\n| a longer name | 1 |"
    assert plain(rows) == "model          eager\na longer name      1"


@given(st.text(), st.text(), st.text())
def test_only_what_is_between_the_markers_changes(before: str, old: str, new: str) -> None:
    text = f"{before}{BEGIN}{old}{END} after"
    written = between(text, new)
    assert written == f"{before}{BEGIN}\n{new}\n{END} after"
    assert between(written, new) == written


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_text_without_one_pair_of_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        between(text, "new")


def test_the_readme_has_a_place_for_the_table() -> None:
    assert "new table" in between(command.README.read_text(), "new table")


# -- results -------------------------------------------------------------------------------------------------------


def test_results_keep_the_newest_figure_of_each_name(tmp_path: Path) -> None:
    results.save([{"name": "a", "value": 1}, {"name": "b", "value": 1}], "cpu", tmp_path)
    path = results.save([{"name": "b", "value": 2}], "cpu", tmp_path)
    (kept,) = results.read(tmp_path)
    assert kept["figures"] == [{"name": "a", "value": 1}, {"name": "b", "value": 2}]
    assert kept["machine"]["name"].endswith("cores")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_stamp_says_when_and_how(tmp_path: Path) -> None:
    stamped = results.stamped({"name": "a"}, ["python -m bench", "--quick"])
    assert stamped["command"] == "python -m bench --quick"
    assert set(stamped) == {"name", "date", "command", "commit"}


# -- who is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_meets_ours_eager_and_compiled(name: str, device: str) -> None:
    python = sys.executable
    peers = step_peers(WORKLOADS[name], jax=python, tf=python, device=device)
    assert {OURS, "eager", "compile"} <= {spec.group for spec in peers}
    assert len({spec.name for spec in peers}) == len(peers)
    assert all((Path(results.__file__).parent / "peers" / f"{spec.module}.py").exists() for spec in peers)
    assert all(WORKLOADS[name].check_steps % spec.steps_per_call == 0 for spec in peers)


def test_unknown_names_are_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no peer is called egaer; here there are eager"):
        select([EAGER], ["egaer"])
    with pytest.raises(SystemExit):
        command.main(["--models", "nlp"])
    said = capsys.readouterr().err
    assert all(name in said for name in STANDARD)
    with pytest.raises(SystemExit, match="expected a virtual environment"):
        command.main(["--quick", "--jax", "/nowhere"])


# -- real processes ------------------------------------------------------------------------------------------------


def test_a_peer_that_ends_is_reported_and_left_out(tmp_path: Path) -> None:
    broken = PeerSpec("broken", "eager", "a broken peer", "no_such_peer")
    found = race(WORKLOADS["mlp"], PRECISIONS[0], [broken], Settings(tmp_path, threads=1, rounds=1))
    assert found.samples == {}
    assert "a broken peer ended" in found.failed["broken"]
    assert "no_such_peer" in found.failed["broken"]


def test_a_silent_worker_is_given_up(tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec cat\n")
    sleeper.chmod(0o700)
    with (
        Worker(PeerSpec("silent", "eager", "a silent peer", "eager", python=str(sleeper)), {}, {}) as worker,
        pytest.raises(PeerError, match="a silent peer did not answer within 0 s"),
    ):
        worker.answer(0.1)


def test_a_first_step_is_timed_in_a_fresh_process_from_the_call_of_fit(tmp_path: Path) -> None:
    (fit,) = first_steps(WORKLOADS["mlp"], "float32", [FIT], Settings(tmp_path, threads=1, rounds=1)).samples.values()
    assert fit.ready["steps"] == 1
    assert fit.ready["loss"] == pytest.approx(math.log(10), abs=0.3)
    assert [fit.ready["first_step_s"]] == fit.seconds
    assert 0 < fit.seconds[0] < 60


@pytest.mark.long
@pytest.mark.slow  # three processes that import torch, one of them compiles
def test_a_quick_run_measures_the_same_work(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "save", lambda *_: pytest.fail("a quick run keeps nothing"))
    status = command.main(
        ["--quick", "--kinds", "step", "--peers", "eager,millrace", "--threads", "1", "--turn", "0.02"]
    )
    out = capsys.readouterr().out
    figure = json.loads(out.splitlines()[0])
    assert status == 0, out
    assert figure["disagreeing"] == []
    assert figure["failed"] == {}
    assert figure["peers"]["millrace"]["tier"] == "inductor"
    assert figure["peers"]["millrace"]["loss"] == pytest.approx(figure["peers"]["eager"]["loss"], rel=1e-3)
    assert figure["ratios"]["millrace"]["eager"]["median"] > 0
    assert all(peer["memory"]["steps_bytes"] > 0 for peer in figure["peers"].values())
    assert "tiny MLP" in out.splitlines()[-1]
