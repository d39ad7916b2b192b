"""Translate: it learns, nothing leaks, what a file becomes, and it runs divided and goes on as any task does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from millrace.data.pairs import PairBatches
from millrace.errors import DataError, SettingError
from millrace.place.grouping import group
from millrace.replicas.settings import Async
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.run import Division, Finished, configure, configure_again, find_run, open_run, step_graph, train
from millrace.zoo.translate import Translate, TranslateSettings, bleu

for needed in ("tokenizers", "sacrebleu", "sklearn"):
    pytest.importorskip(needed)

REVERSAL = ["data=reversal", "longest=4", "pieces=320", "width=64", "dropout=0", "label_smoothing=0", "beam=2"]
TINY = ["pieces=300", "width=8", "heads=2", "batch_size=4", "compile=eager", "evaluate_every=3", "checkpoint_every=3"]


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentence pairs of one's own."""
    draw = random.Random(0)
    words = {"red": "rot", "green": "grün", "old": "alt", "file": "Datei", "open": "offen", "%(n)s": "%(n)s"}
    file = tmp_path_factory.mktemp("pairs") / "it.tsv"
    lines = {" ".join(draw.choices(list(words), k=4)) for _ in range(400)}
    file.write_text("".join(f"{line}\t{' '.join(words[w] for w in line.split())}\n" for line in sorted(lines)))
    return file


@pytest.fixture(scope="module")
def reversing(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    settings = [*REVERSAL, "kind=transformer", "steps=220", "learning_rate=0.005", "compile=eager", "threads=1"]
    return train(
        configure("translate", settings), run_dir=tmp_path_factory.mktemp("runs") / "it", progress=False, device="cpu"
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three steps on the same sentences, of two to four words."""
    task = configure("translate", ["data=reversal", "longest=4", *TINY, "steps=3"])
    return train(task, run_dir=tmp_path_factory.mktemp("runs") / "it", progress=False, device="cpu")


@pytest.mark.long
def test_it_learns_to_reverse_and_substitute(reversing: Finished) -> None:
    assert reversing.test["exact"] >= 0.95
    assert reversing.test["bleu"] >= 95
    assert reversing.test["bleu_of_copy"] < 20
    assert reversing.test["token_accuracy"] >= 0.95
    assert "BLEU of copying the source: " in reversing.report
    assert "BLEU of the nearest training source's translation: " in reversing.report
    assert reversing.report.count("→") >= 5


@pytest.mark.long
def test_a_text_is_translated_line_by_line(reversing: Finished, tmp_path: Path) -> None:
    assert reversing.result.run_dir is not None
    opened = open_run(find_run(str(reversing.result.run_dir)), "cpu")
    file = tmp_path / "it.txt"
    file.write_text("a b\n\nb a\n")
    said = opened.task.predict(opened.model, file, opened.facts)
    one, other = said.values["translations"]  # type: ignore[misc]
    assert said.text == f"{one}\n{other}"
    assert one.split() == other.split()[::-1]  # type: ignore[union-attr]
    assert said.pictures["attention"].shape[0] == 1
    file.write_text("a b c d e\n")
    assert (
        "a line has 5 subwords; the model learned from at most 4"
        in opened.task.predict(opened.model, file, opened.facts).text
    )
    kept = sorted(file.name for file in (reversing.result.run_dir / "pictures").glob("*.png"))
    assert kept == [f"attention_{number}.png" for number in range(5)]


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b" \n\n", b"%s " * 11], ids=["no", "bytes", "empty", "full"])
def test_a_text_that_cannot_be_translated_is_named(content: bytes | None, begun: Finished, tmp_path: Path) -> None:
    opened = open_run(find_run(str(begun.result.run_dir)), "cpu")
    file = tmp_path / "it.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"it\.txt"):
        opened.task.predict(opened.model, file, opened.facts)


@pytest.mark.long
def test_it_is_exact_up_to_thirty_words(tmp_path: Path) -> None:
    settings = ["data=reversal", "longest=30", "pieces=320", "dropout=0", "label_smoothing=0", "kind=transformer"]
    settings += ["width=128", "steps=1500", "learning_rate=0.003", "compile=eager"]
    finished = train(configure("translate", settings), run_dir=tmp_path / "it", progress=False, device="cpu")
    assert finished.test["exact"] >= 0.99


def test_parts_share_no_sentence(phrases: Path) -> None:
    found = Translate(TranslateSettings(data=str(phrases), batch_size=4, pieces=300)).data()
    sources = [
        {tuple(source) for source, _ in part.pairs}
        for part in (found.train, found.validation, found.test)
        if isinstance(part, PairBatches)
    ]
    assert len(sources) == 3
    assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]


def test_a_placement_takes_every_layer_as_one(phrases: Path) -> None:
    graph = step_graph(configure("translate", [*TINY, f"data={phrases}", "dropout=0.1"]))
    groups = set(group(graph, lambda node: 1.0).groups)
    layers = {"encoder.forwards", "encoder.backwards", "encoder.layers.0", "decoder.layers.0", "decoder.layers.1"}
    assert layers | {"encoder.embedding", "decoder.embedding", "decoder.readout"} <= groups
    assert not [name for name in groups if name.startswith(tuple(f"{layer}." for layer in layers))]


WAYS = {
    "two blocks": Division(partitions=2),
    "two in step": Division(replicas=2, update="sync"),
    "two on their own": Division(replicas=2, update=Async()),
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_it_runs_divided(way: str, phrases: Path, tmp_path: Path) -> None:
    task = configure("translate", [*TINY, f"data={phrases}", "steps=6"])
    finished = train(task, run_dir=tmp_path / "it", progress=False, device="cpu", division=WAYS[way])
    assert finished.result.steps == 6
    assert 0 <= finished.test["bleu"] <= 100
    assert finished.test["loss"] < 8


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, step: int, values: object) -> None:
        if step == self._step:
            run.stop()


@pytest.mark.long
def test_a_run_that_was_stopped_ends_with_the_same_bits(phrases: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data={phrases}", "steps=6"]
    train(configure("translate", settings), run_dir=tmp_path / "whole", progress=False, device="cpu")
    half = configure("translate", settings)
    train(half, run_dir=tmp_path / "half", progress=False, device="cpu", callbacks=[StopAt(4)])
    run = find_run(str(tmp_path / "half"))
    train(configure_again(run), resume=run, progress=False, device="cpu")
    one, other = (Checkpoints(tmp_path / name / "checkpoints").load() for name in ("whole", "half"))
    assert one.step == other.step == 6
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_too_little_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.tsv"
    file.write_text("hello\tbonjour\nbye\tau revoir\n")
    with pytest.raises(DataError, match="too few to hold some out"):
        Translate(TranslateSettings(data=str(file))).data()
    with pytest.raises(SettingError, match="kind takes lstm or transformer"):
        configure("translate", ["kind=gru"])


def test_bleu_is_what_it_says() -> None:
    assert bleu(["the file was not found here"], ["the file was not found here"]) == pytest.approx(100)
    assert bleu(["nothing of it"], ["le fichier est introuvable"]) < 10
