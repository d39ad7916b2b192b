"""Reply: it learns which messages deserve a reply and which, and is the same run however it is divided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

import pytest
import torch
from tests.small import differing

from millrace.errors import DataError
from millrace.models.reply_model import ReplyModel
from millrace.replicas.settings import Async
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.reply import Reply, ReplySettings
from millrace.zoo.run import Division, Finished, Opened, configure, configure_again, find_run, open_run, train

TINY = ["width=16", "pieces=320", "longest=40", "longest_reply=16", "beam=4", "compile=eager", "batch_size=16"]
PAIRS = {
    "Do you want lunch on day {}?": ["Yes, gladly!", "Yes, I'd love to!", "No, sorry.", "Maybe."],
    "Thank you for gift {}!": ["You're welcome!"],
    "Please call me back at {} today.": ["Will do.", "I'm busy."],
    "Receipt number {} of your order.": [""],
    "Newsletter {}: all our offers.": [""],
}


@pytest.fixture(scope="module")
def exchanges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exchanges") / "it.tsv"
    clusters = {"Yes, gladly!": "yes", "Yes, I'd love to!": "yes"}
    rows = [
        (message.format(n), reply, clusters.get(reply, ""))
        for n in range(80)
        for message, replies in PAIRS.items()
        for reply in [replies[n % len(replies)]]
    ]
    file.write_text("\n".join("\t".join(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def finished(exchanges: Path) -> Finished:
    task = configure("reply", [*TINY, f"data={exchanges}", "steps=200", "learning_rate=0.01", "dropout=0"])
    return train(task, run_dir=exchanges.parent / "run", progress=False, device="cpu")


@pytest.fixture(scope="module")
def opened(finished: Finished) -> Opened:
    return open_run(find_run(str(finished.result.run_dir)), "cpu")


@pytest.fixture(scope="module")
def whole(exchanges: Path) -> Path:
    return run(exchanges, "whole")


def run(exchanges: Path, name: str, *callbacks: Callback, **division: object) -> Path:
    """A short run's directory."""
    directory = exchanges.parent / name
    task = configure("reply", [*TINY, f"data={exchanges}", "steps=6", "checkpoint_every=3", "dropout=0"])
    divided = Division(**division)  # type: ignore[arg-type]
    train(task, run_dir=directory, progress=False, device="cpu", division=divided, callbacks=callbacks)
    return directory


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self._last = step

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step == self._last:
            run.stop()


def test_it_learns_what_deserves_a_reply_and_which(finished: Finished) -> None:
    assert finished.test["precision"] > 0.95
    assert finished.test["recall"] > 0.95
    assert finished.test["top3"] > 0.9
    assert finished.test["top1"] < finished.test["top3"]


def test_the_report_tells_what_the_trigger_saves(finished: Finished) -> None:
    hits, frequent = (float(share) for share in re.findall(r"^ +(\d+\.\d)%", finished.report, re.MULTILINE))
    assert hits == pytest.approx(100 * finished.test["top3"], abs=0.1)
    assert frequent < hits
    passed, saved = (int(share) for share in re.findall(r"(\d+)%(?: pass| of the time)", finished.report))
    assert 40 < passed < 70  # three of five messages deserve a reply, and somewhat fewer of those in the test
    assert 10 < saved < 100 - passed + 1
    assert "(no short reply is due)" in finished.report


def test_a_message_gets_three_replies_or_none(opened: Opened, tmp_path: Path) -> None:
    message = tmp_path / "message.txt"
    message.write_text("Do you want lunch\non day 17?\n")
    said = opened.task.predict(opened.model, message, opened.facts)
    assert isinstance(said.values["replies"], list)
    assert len({reply for reply in said.values["replies"] if reply in PAIRS["Do you want lunch on day {}?"]}) == 3
    message.write_text("Receipt number 1234 of your order.")
    assert opened.task.predict(opened.model, message, opened.facts).values["replies"] == []
    for content, says in ((b"", "empty"), (b"\xff", "cannot be read")):
        message.write_bytes(content)
        with pytest.raises(DataError, match=says):
            opened.task.predict(opened.model, message, opened.facts)


def test_a_message_without_a_reply_teaches_the_writer_nothing() -> None:
    task = Reply(ReplySettings(width=8, dropout=0.0))
    torch.manual_seed(0)
    model = ReplyModel(50, width=8, layers=2, dropout=0.0)
    batch = {"message": torch.randint(3, 50, (2, 6)), "reply": torch.zeros(2, 4, dtype=torch.int64)}
    task.loss(model, batch | {"answered": torch.zeros(2)})[0].backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.writer.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.trigger.parameters() if p.grad is not None)


@pytest.mark.long
@pytest.mark.parametrize("division", [{"replicas": 2}, {"partitions": 2}], ids=["replicas", "partitions"])
def test_divided_it_is_the_same_run(division: dict[str, object], whole: Path, exchanges: Path) -> None:
    directories = (whole, run(exchanges, f"divided {division}", **division))
    one, other = (open_run(find_run(str(directory)), "cpu").model.state_dict() for directory in directories)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.long
def test_it_trains_asynchronously(exchanges: Path) -> None:
    directory = run(exchanges, "async", replicas=2, update=Async(copies=False))
    assert open_run(find_run(str(directory)), "cpu").step == 6


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit(whole: Path, exchanges: Path) -> None:
    first = find_run(str(run(exchanges, "in two", StopAfter(4))))
    train(configure_again(first), resume=first, progress=False, device="cpu")
    one, other = (Checkpoints(find_run(str(path)).checkpoints).load().tensors for path in (whole, first.path))
    assert differing(dict(one), dict(other)) == []


def test_too_few_replies_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.tsv"
    file.write_text("\n".join(f"Message {n}\t{'Yes!' if n % 2 else ''}" for n in range(100)))
    with pytest.raises(DataError, match="too few different replies"):
        configure("reply", [*TINY, f"data={file}"]).data()
