"""Chars: the stream, the model's blindness to what comes later, sampling, and a run from a text of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from millrace.data.text import CharVocabulary
from millrace.errors import DataError
from millrace.zoo.base import TaskData
from millrace.zoo.chars import Chars, CharsSettings, Transformer
from millrace.zoo.run import Finished, configure, find_run, open_run, train

TINY = ["length=16", "layers=1", "width=16", "heads=2", "batch_size=8", "sample=40", "compile=eager", "threads=1"]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rhyme.txt"
    file.write_text("\n".join(f"{n} green bottles hanging on the wall,\n" for n in range(200, 0, -1)))
    return file


@pytest.fixture(scope="module")
def finished(nursery: Path) -> Finished:
    task = configure("chars", [*TINY, f"text={nursery}", "steps=200", "learning_rate=0.01", "prompt=12 gr€en "])
    return train(task, run_dir=nursery.parent / "run", progress=False, device="cpu")


def data(**changes: object) -> TaskData:
    return Chars(CharsSettings(**changes)).data()  # type: ignore[arg-type]


def decoded(found: TaskData, tokens: Tensor) -> str:
    return CharVocabulary.from_json(found.facts["vocabulary"]).decode(tokens)  # type: ignore[arg-type]


def transformer(length: int = 12, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(vocabulary=7, length=length, layers=2, width=8, heads=2, dropout=0.0).double().eval()
    for parameter in model.parameters():  # the sublayers start as nothing, which would hide what they do
        nn.init.normal_(parameter, std=0.5)
    return model


def test_a_target_is_the_character_after_its_input() -> None:
    found = data(length=64)
    for batch in found.train.until(batches=3):
        assert batch["inputs"].shape == batch["targets"].shape == (16, 64)
        assert batch["inputs"][:, 1:].equal(batch["targets"][:, :-1])


def test_what_is_held_out_is_never_learned_from() -> None:
    found = data(length=64)
    learned, validation, test = (
        [decoded(found, row) for batch in part.one_pass() for row in batch["inputs"]]
        for part in (found.train, found.validation, found.test)
    )
    everything = "".join(learned)
    assert len(validation) + len(test) > 200
    assert [window for window in validation + test if window in everything] == []
    assert not set(validation) & set(test)


def test_held_out_batches_are_of_one_size() -> None:
    found = data(length=64, batch_size=7)
    for part in (found.validation, found.test):
        assert {len(batch["inputs"]) for batch in part.one_pass()} == {7}


def test_the_stream_goes_on_where_it_was() -> None:
    whole = [batch["inputs"] for batch in data(length=64, seed=3).train.until(batches=6)]
    first, second = data(length=64, seed=3).train, data(length=64, seed=3).train
    for _ in first.until(batches=2):
        pass
    second.seek(first.position())
    assert all(a.equal(b["inputs"]) for a, b in zip(whole[2:], second.until(batches=6), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.data())
def test_no_character_sees_a_later_one(tokens: list[int], draw: st.DataObject) -> None:
    changed_at = draw.draw(st.integers(1, len(tokens) - 1))
    one = torch.tensor([tokens])
    other = one.clone()
    other[0, changed_at:] = (other[0, changed_at:] + 1) % 7
    with torch.no_grad():
        before, after = transformer()(one), transformer()(other)
    assert torch.allclose(before[:, :changed_at], after[:, :changed_at], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, changed_at:], after[:, changed_at:], atol=1e-6)


def test_every_character_sees_all_earlier_ones() -> None:
    tokens = torch.randint(7, (1, 12), generator=torch.Generator().manual_seed(0))
    model = transformer()
    model.place.weight.grad = None
    model(tokens)[0, -1].square().sum().backward()
    assert model.place.weight.grad is not None
    assert (model.place.weight.grad.abs().amax(-1) > 1e-9).all()


def test_a_fresh_model_guesses_evenly() -> None:
    found = data()
    task = Chars(CharsSettings(length=32, layers=1))
    batch = next(iter(found.train))
    batch = {name: part[:, :32] for name, part in batch.items()}
    torch.manual_seed(0)
    _, metrics = task.loss(task.model(found.facts), batch)
    vocabulary = CharVocabulary.from_json(found.facts["vocabulary"])  # type: ignore[arg-type]
    assert float(metrics["bits_per_char"].detach()) == pytest.approx(math.log2(len(vocabulary)), rel=0.15)


def test_it_learns_a_text_of_ones_own_and_writes_like_it(finished: Finished, nursery: Path) -> None:
    assert finished.test["bits_per_char"] < 2.0
    assert finished.test["bits_per_char"] == pytest.approx(finished.test["loss"] / math.log(2), rel=1e-4)
    assert "12 gren " in finished.report, "the prompt, without what the text does not have"
    words = finished.report.partition("12 gren ")[2].split()[1:-1]  # the first and the last may be parts of words
    assert len(words) >= 3
    assert sum(word in nursery.read_text().split() for word in words) >= len(words) / 2


def test_a_text_is_gone_on_with(finished: Finished, nursery: Path, tmp_path: Path) -> None:
    opened = open_run(find_run(str(finished.result.run_dir)), "cpu")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("77 green bot~tles ha")
    said = opened.task.predict(opened.model, prompt, opened.facts)
    assert said.values["left_out"] == "~"
    assert "left out '~'" in said.text
    continuation = said.values["continuation"]
    assert isinstance(continuation, str)
    assert len(continuation) == 40
    assert set(continuation) <= set(nursery.read_text())
    assert opened.task.predict(opened.model, prompt, opened.facts) == said
    prompt.write_text("")
    assert len(str(opened.task.predict(opened.model, prompt, opened.facts).values["continuation"])) == 40


@pytest.mark.parametrize("make", [None, b"\xff\xfe\x00"], ids=["missing", "not text"])
def test_an_unreadable_text_is_named(make: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    if make is not None:
        file.write_bytes(make)
    with pytest.raises(DataError, match=r"The text file .*it.txt cannot be read"):
        data(text=str(file))


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    file.write_text("too short to learn from\n" * 3)
    with pytest.raises(DataError, match="more text"):
        data(text=str(file))
