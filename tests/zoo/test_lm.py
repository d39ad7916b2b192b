"""Lm: the state that goes on, in one process, over replicas and after a resume; what it is compared with; its text."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

import pytest
import torch
from tests.small import differing

from millrace.data.streams import stream_batches
from millrace.errors import DataError, SettingError
from millrace.models.byte_lstm import ByteLstm, log2_probabilities
from millrace.replicas.settings import Async
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.lm import Lm, LmSettings
from millrace.zoo.run import Division, Finished, configure, configure_again, find_run, open_run, train

TINY = ["length=16", "width=24", "embedding=8", "rows=512", "batch_size=8", "sample=40", "compile=eager", "ngrams=2,3"]


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rhyme.txt"
    file.write_text("\n\n".join(f"{n} green bottles hanging on the wall," for n in range(600, 0, -1)))
    return file


@pytest.fixture(scope="module")
def finished(rhyme: Path) -> Finished:
    task = configure("lm", [*TINY, f"data={rhyme}", "steps=150", "learning_rate=0.01", "prompt=12 gr"])
    return train(task, run_dir=rhyme.parent / "run", progress=False, device="cpu")


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self._last = step

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step == self._last:
            run.stop()


def run(rhyme: Path, name: str, *changes: str, callbacks: Sequence[Callback] = (), **division: object) -> Path:
    """A short run's directory."""
    directory = rhyme.parent / name
    task = configure("lm", [*TINY, f"data={rhyme}", "steps=12", "checkpoint_every=6", *changes])
    divided = Division(**division)  # type: ignore[arg-type]
    train(task, run_dir=directory, progress=False, device="cpu", division=divided, callbacks=callbacks)
    return directory


@pytest.fixture(scope="module")
def whole(rhyme: Path) -> Path:
    return run(rhyme, "whole")


def variables(directory: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoints(find_run(str(directory)).checkpoints).load().tensors)


def largest_difference(one: Path, other: Path) -> float:
    """Of the parameters and the carried state that two runs have left."""
    models = [open_run(find_run(str(directory)), "cpu").model for directory in (one, other)]
    assert carried(models[0]).abs().max() > 0.1
    found = [dict(model.named_parameters()) | {"state": carried(model)} for model in models]
    return max(float((found[0][name] - found[1][name]).detach().abs().max()) for name in found[0])


def carried(model: torch.nn.Module) -> torch.Tensor:
    assert isinstance(model, ByteLstm)
    streams = len(model.carried.state)
    return model.carried.read(torch.arange(streams), torch.zeros(streams, dtype=torch.bool))


def lstm_of(task: Lm) -> ByteLstm:
    model = task.model({})
    assert isinstance(model, ByteLstm)
    return model


def test_it_learns_a_text_of_ones_own_better_than_counting(finished: Finished, rhyme: Path) -> None:
    bits = finished.test["bits_per_byte"]
    assert bits < 0.9
    assert bits == pytest.approx(finished.test["loss"] / math.log(2))
    shown = {
        name: float(value)
        for value, name in (line.strip().split("  ", 1) for line in finished.report.splitlines()[1:9])
    }
    assert shown["this model"] == pytest.approx(bits, abs=1e-3)
    assert shown["xz -9, of the test text alone"] > bits
    assert shown["gzip -9, which read the training text before"] < shown["gzip -9, of the test text alone"]
    (mixed,) = [value for name, value in shown.items() if "% of the 5-gram" in name]
    assert mixed < min(bits, shown["5-gram, interpolated Kneser-Ney"]) + 0.05  # the share is chosen on other text
    words = finished.report.partition("12 gr")[2].split()[1:-1]
    assert sum(word in rhyme.read_text().split() for word in words) >= len(words) / 2


def test_a_text_is_gone_on_with(finished: Finished, tmp_path: Path) -> None:
    opened = open_run(find_run(str(finished.result.run_dir)), "cpu")
    prompt = tmp_path / "prompt.txt"
    for content in (b"77 green bott", b"\xff\x00", b""):
        prompt.write_bytes(content)
        said = opened.task.predict(opened.model, prompt, opened.facts)
        assert len(str(said.values["continuation"])) > 20
        assert opened.task.predict(opened.model, prompt, opened.facts) == said
    with pytest.raises(DataError, match=r"missing.txt cannot be read"):
        opened.task.predict(opened.model, tmp_path / "missing.txt", opened.facts)


def test_training_goes_on_with_the_state_of_the_window_before() -> None:
    task = Lm(LmSettings(width=12, embedding=4, rows=64, batch_size=3, length=8))
    torch.manual_seed(0)
    model = lstm_of(task).double().train()
    batches = stream_batches(torch.randint(256, (3 * 33,), dtype=torch.uint8), 3, 8, model.before)
    losses = [float(task.loss(model, batch)[0].detach()) for batch in batches.one_pass()]
    assert len(losses) == 4
    whole = -log2_probabilities(model, stream_batches(batches.tokens, 3, 32, model.before)) * math.log(2)
    assert losses == pytest.approx(whole.view(3, 4, 8).mean((0, 2)).tolist(), abs=1e-6)
    cut = -log2_probabilities(model, batches, carry=False) * math.log(2)
    assert losses[0] == pytest.approx(float(cut[:, :8].mean()), abs=1e-6)
    assert losses[1] != pytest.approx(float(cut[:, 8:16].mean()), abs=1e-6)


def test_evaluation_leaves_the_state_alone() -> None:
    task = Lm(LmSettings(width=12, embedding=4, rows=64, batch_size=3, length=8))
    model = lstm_of(task).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task.loss(model, next(stream_batches(torch.randint(256, (99,)), 2, 8, model.before).one_pass()))
    assert differing(before, dict(model.state_dict())) == []


@pytest.mark.long
def test_carried_state_pays_where_what_counts_is_further_away_than_a_window(tmp_path: Path) -> None:
    # Every line is of one letter, with single digits strewn in: after a digit only the state knows the letter.
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        letter = draw.choice("abcdefgh")
        lines.append(" ".join(draw.choice([letter, "0"]) * 12 for _ in range(40)))
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(lines))
    bits = {}
    for carry in ("true", "false"):
        task = configure("lm", [*TINY, f"data={file}", "steps=500", "learning_rate=0.01", "length=8", f"carry={carry}"])
        bits[carry] = train(task, run_dir=False, progress=False, device="cpu").test["bits_per_byte"]
    assert bits["true"] < 0.85 * bits["false"]


@pytest.mark.parametrize(
    "division",
    [{"replicas": 2}, {"partitions": 2}, pytest.param({"devices": 2, "microbatches": 2}, marks=pytest.mark.long)],
    ids=["replicas", "partitions", "microbatches"],
)
def test_divided_it_is_the_same_run(division: dict[str, object], whole: Path, rhyme: Path) -> None:
    assert largest_difference(whole, run(rhyme, f"divided {division}", **division)) < 1e-4


@pytest.mark.long
def test_it_learns_asynchronously(rhyme: Path) -> None:
    directory = run(rhyme, "async", "steps=60", "learning_rate=0.01", replicas=2, update=Async(copies=False))
    opened = open_run(find_run(str(directory)), "cpu")
    assert opened.task.evaluate(opened.model, opened.task.data(opened.facts).test)["bits_per_byte"] < 4


def test_a_run_goes_on_bit_for_bit(whole: Path, rhyme: Path) -> None:
    first = find_run(str(run(rhyme, "in two", callbacks=[StopAfter(6)])))
    train(configure_again(first), resume=first, progress=False, device="cpu")
    assert differing(variables(whole), variables(first.path)) == []


@pytest.mark.parametrize("wrong", ["ngrams=2,x", "ngrams=0", "top_p=0", "temperature=-1"])
def test_wrong_settings_are_refused(wrong: str) -> None:
    with pytest.raises(SettingError):
        configure("lm", [wrong])


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    file.write_text("too short a text to learn from\n")
    with pytest.raises(DataError, match="at least 20"):
        Lm(LmSettings(data=str(file))).data()
