"""Speech: a folder of one's own is learned from, whole and divided; held-out texts stay so; files are understood."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.data.audio import write_wav
from millrace.data.espeak import Espeak, Utterance, spoken
from millrace.errors import DataError
from millrace.replicas.settings import Async
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.base import TaskData
from millrace.zoo.run import Division, Finished, configure, configure_again, find_run, open_run, train
from millrace.zoo.speech import CONDITIONS, RATE_HZ, Speech, SpeechSettings

loader = pytest.importorskip("espeakng_loader", reason="speech is made by the package espeakng-loader")
ESPEAK = Espeak(Path(loader.get_library_path()), Path(loader.get_data_path()))
SMALL = ["width=32", "layers=1", "max_s=1.7", "batch_size=16", "dropout=0", "compile=eager", "threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits at a time, in one of three voices."""
    directory = tmp_path_factory.mktemp("sentences")
    texts = [" ".join(pair) for pair in itertools.product(("one", "two", "six", "nine"), repeat=3)]
    voices = itertools.cycle(["en-us+m1", "en-us+f2", "en-us+max"])
    utterances = [Utterance(text, voice, 190) for text, voice in zip(texts, voices, strict=False)]
    for number, recording in enumerate(spoken(utterances, ESPEAK, RATE_HZ)):
        write_wav(recording.float() / 32768, directory / f"{number:03}.wav", RATE_HZ)
        (directory / f"{number:03}.txt").write_text(utterances[number].text)
    return directory


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    task = configure("speech", [*SMALL, f"data={folder}", "steps=150", "learning_rate=0.01"])
    return train(task, run_dir=tmp_path_factory.mktemp("speech") / "run", progress=False, device="cpu")


def own(folder: Path, **changes: object) -> TaskData:
    return Speech(SpeechSettings(data=str(folder), max_s=1.7, batch_size=8, **changes)).data()  # type: ignore[arg-type]


def texts(data: TaskData, part: str) -> set[tuple[int, ...]]:
    batches = getattr(data, part).one_pass()
    return {tuple(row.tolist()) for batch in batches for row in batch["letters"]}


@pytest.mark.long
def test_a_few_spoken_digits_are_learned_from_a_folder(finished: Finished) -> None:
    assert finished.test["word_error"] <= 0.35
    assert set(finished.test) == {"loss", "word_error", *(f"word_error_{name}" for name in CONDITIONS)}
    assert "letter by letter" in finished.report
    assert (Path(str(finished.result.run_dir)) / "pictures" / "heard.png").stat().st_size > 1000


@pytest.mark.long
def test_a_file_is_understood(finished: Finished, folder: Path, tmp_path: Path) -> None:
    opened = open_run(find_run(str(finished.result.run_dir)), "cpu")
    right = 0
    for number in range(0, 64, 5):
        said = opened.task.predict(opened.model, folder / f"{number:03}.wav", opened.facts)
        right += said.values["text"] == (folder / f"{number:03}.txt").read_text()
    assert right >= 8
    assert said.pictures["heard"].ndim == 3
    with pytest.raises(DataError, match="no sound file"):
        opened.task.predict(opened.model, tmp_path / "none.wav", opened.facts)
    write_wav(torch.ones(100), tmp_path / "short.wav", RATE_HZ)
    with pytest.raises(DataError, match="too short"):
        opened.task.predict(opened.model, tmp_path / "short.wav", opened.facts)


def test_no_text_is_in_two_parts_and_a_seed_changes_the_order_only(folder: Path) -> None:
    data, other = own(folder), own(folder, seed=5)
    parts = [texts(data, part) for part in ("train", "validation", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(set.union(*parts)) == 64
    assert texts(other, "test") == parts[2]
    first, second = (next(iter(each.train))["features"] for each in (data, other))
    assert not first.equal(second)
    for each in (data, other):
        each.train.close()


def test_the_factory_makes_ten_times_as_much(folder: Path) -> None:
    with_it, without = own(folder), own(folder, factory=False)
    assert with_it.train.batches_per_epoch == 52 * 10 // 8
    assert without.train.batches_per_epoch == 52 // 8
    shapes = {name: tensor.shape for name, tensor in next(iter(with_it.train)).items()}
    with_it.train.close()
    assert {name: tensor.shape for name, tensor in next(without.train.one_pass()).items()} == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_s": 0.6}, "max_s=0.6. Set max_s higher"), ({"data": "./nowhere"}, "nowhere does not exist")],
)
def test_data_that_does_not_fit_is_refused(changes: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        Speech(SpeechSettings(**{"data": str(folder), **changes})).data()  # type: ignore[arg-type]


def test_too_few_sentences_are_refused(folder: Path, tmp_path: Path) -> None:
    for suffix in ("wav", "txt"):
        (tmp_path / f"a.{suffix}").write_bytes((folder / f"000.{suffix}").read_bytes())
    with pytest.raises(DataError, match="1 different sentences, but at least 10"):
        Speech(SpeechSettings(data=str(tmp_path))).data()


WAYS = {
    "alone": Division(),
    "two parts": Division(partitions=2),
    "two replicas": Division(replicas=2),
    "async": Division(replicas=2, update=Async(copies=False)),
}


def weights(finished: Finished) -> list[Tensor]:
    opened = open_run(find_run(str(finished.result.run_dir)), "cpu")
    return list(opened.model.state_dict().values())


@pytest.mark.long
def test_it_is_divided_without_a_change(folder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"data={folder}", "steps=6", "checkpoint_every=6", "evaluate_every=6"]
    made = {
        name: train(
            configure("speech", settings), run_dir=tmp_path / name, progress=False, device="cpu", division=division
        )
        for name, division in WAYS.items()
    }
    assert all(done.result.steps == 6 for done in made.values())
    for name in ("two parts", "two replicas"):
        for one, other in zip(weights(made["alone"]), weights(made[name]), strict=True):
            assert torch.allclose(one, other, atol=1e-4), name
    assert made["async"].test["loss"] < 10


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, step: int, values: object) -> None:
        if step == self._step:
            run.stop()


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "dropout=0.2", f"data={folder}", "steps=8", "checkpoint_every=4", "evaluate_every=4"]
    whole = train(configure("speech", settings), run_dir=tmp_path / "whole", progress=False, device="cpu")
    stopped = StopAt(5)
    train(configure("speech", settings), run_dir=tmp_path / "cut", progress=False, device="cpu", callbacks=[stopped])
    cut = find_run(str(tmp_path / "cut"))
    resumed = train(configure_again(cut), resume=cut, progress=False, device="cpu")
    assert resumed.result.steps == 8
    assert all(one.equal(other) for one, other in zip(weights(whole), weights(resumed), strict=True))
