"""Words: relations that were planted are found, in one process and in several; predictions; what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat, cast

import pytest
import torch

from millrace.errors import DataError
from millrace.replicas.settings import Async
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.base import TaskData
from millrace.zoo.run import Division, Finished, configure, configure_again, find_run, open_run, train
from millrace.zoo.words import Words, WordsSettings

PLANTED = ["data=planted", "compile=eager", "threads=1", "batch_size=16", "width=48", "learning_rate=0.1"]

ALONE = Division()


def trained(where: Path, settings: Sequence[str] = (), division: Division = ALONE) -> Finished:
    task = configure("words", [*PLANTED, *settings])
    return train(task, run_dir=where, progress=False, device="cpu", division=division)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return trained(tmp_path_factory.mktemp("words") / "run", ["sentences=12000", "epochs=6"])


def test_planted_relations_are_found(finished: Finished) -> None:
    assert finished.test["analogies"] >= 0.9
    assert finished.test["similarity"] >= 0.3
    assert finished.report.startswith("nearest words:\n  warm: ")
    path = finished.result.run_dir
    assert path is not None
    assert (path / "pictures" / "words.png").stat().st_size > 5000
    assert len((path / "events" / "names.tsv").read_text().splitlines()) > 600


def test_words_and_sums_are_answered(finished: Finished, tmp_path: Path) -> None:
    opened = open_run(find_run(str(finished.result.run_dir)), "cpu")
    asked = tmp_path / "asked.txt"
    asked.write_text("hotter - hot + big\n\nparis\n")
    said = opened.task.predict(opened.model, asked, opened.facts)
    near = cast(dict[str, list[str]], said.values["nearest"])
    assert near["hotter - hot + big"][0] == "bigger"
    assert len(near["paris"]) == 5
    assert said.text.startswith("hotter - hot + big: bigger 0.")
    assert said.pictures["words"].shape[0] == 3
    for text, message in (("", "is empty"), ("hott", "Did you mean 'hot'"), ("+ -", "neither a word nor a sum")):
        asked.write_text(text)
        with pytest.raises(DataError, match=message):
            opened.task.predict(opened.model, asked, opened.facts)
    with pytest.raises(DataError, match=r"none.txt cannot be read"):
        opened.task.predict(opened.model, tmp_path / "none.txt", opened.facts)


@pytest.mark.long
def test_sampled_softmax_finds_them_too(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", ["sentences=12000", "epochs=4", "objective=sampled_softmax"])
    assert found.test["analogies"] >= 0.9


SHORT = ["sentences=2500", "steps=12", "evaluate_every=12", "checkpoint_every=4"]


def vectors(found: Finished) -> torch.Tensor:
    opened = open_run(find_run(str(found.result.run_dir)), "cpu")
    return cast(torch.Tensor, opened.model.words.weight.detach())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return trained(tmp_path_factory.mktemp("words") / "run", SHORT)


@pytest.mark.parametrize("division", [Division(partitions=2), Division(replicas=2)], ids=["partitions", "replicas"])
def test_divided_it_learns_the_same(division: Division, alone: Finished, tmp_path: Path) -> None:
    found = trained(tmp_path / "run", SHORT, division)
    assert vectors(found).allclose(vectors(alone), rtol=1e-3, atol=1e-4)


class _StopAt(Callback):
    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step == 7:
            run.stop()


def test_a_run_goes_on_bit_for_bit(alone: Finished, tmp_path: Path) -> None:
    stopped = train(
        configure("words", [*PLANTED, *SHORT, "steps_per_call=1"]),
        run_dir=tmp_path / "run",
        progress=False,
        device="cpu",
        callbacks=[_StopAt()],
    )
    assert stopped.result.steps == 7
    run = find_run(str(tmp_path / "run"))
    again = train(configure_again(run), resume=run, progress=False, device="cpu")
    assert again.result.steps == 12
    assert vectors(again).equal(vectors(alone))


def own_text(tmp_path: Path, words: int) -> Path:
    """Of so many different words that a batch names few of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(words, (1500, 10), generator=generator).tolist()
    letters = "abcdefghij"
    names = ["".join(letters[int(digit)] for digit in f"{n:04d}") for n in range(words)]
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(" ".join(names[n] for n in row) for row in rows))
    return file


def test_over_parameter_servers_only_rows_travel(tmp_path: Path) -> None:
    settings = [f"data={own_text(tmp_path, 2000)}", "min_count=1", "batch_size=4", "steps=30", "evaluate_every=30"]
    found = trained(tmp_path / "run", settings, Division(replicas=2, update=Async(parameter_servers=2, copies=False)))
    assert found.result.steps == 30
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "travels whole" not in log
    assert found.result.values["loss"] < 1e9
    moved = vectors(found).norm(dim=1)
    assert (moved > 0.06).float().mean() > 0.2


def data(**changes: object) -> TaskData:
    return Words(WordsSettings(**changes)).data()  # type: ignore[arg-type]


def test_a_text_of_ones_own_is_divided_and_too_short_a_one_refused(tmp_path: Path) -> None:
    found = data(data=str(own_text(tmp_path, 50)), subsample=0.0)
    (held_out,) = found.test.one_pass()
    assert held_out["pairs"].shape == (50 * 49 // 2, 2)
    assert len(held_out["alike"]) == len(held_out["pairs"])
    (tmp_path / "short.txt").write_text("far too short to learn from\n")
    with pytest.raises(DataError, match="Give more text"):
        data(data=str(tmp_path / "short.txt"))
    with pytest.raises(DataError, match="no file or directory"):
        data(data=str(tmp_path / "none.txt"))
