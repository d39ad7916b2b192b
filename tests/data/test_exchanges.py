"""Exchanges: a user's files are read, made-up ones follow the grammar, and parts share no message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.data.exchanges import Exchanges, plain, read_exchanges
from millrace.errors import DataError


@pytest.fixture(scope="module")
def made() -> Exchanges:
    return read_exchanges("", 3000, seed=0)


def lines(count: int = 60) -> list[tuple[str, str, str]]:
    return [(f"Lunch at {n}?", "" if n % 3 == 0 else "Sure!" if n % 3 == 1 else "No, sorry.", "") for n in range(count)]


def written(file: Path, rows: list[tuple[str, str, str]]) -> Path:
    if file.suffix == ".tsv":
        file.write_text("\n".join("\t".join(row).rstrip("\t") for row in rows))
    else:
        names = ("message", "reply", "cluster")
        file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n\n")
    return file


def test_parts_share_no_message(made: Exchanges) -> None:
    messages = [{exchange.message for exchange in part} for part in made]
    assert sum(map(len, messages)) == len(set().union(*messages)) > 2000
    assert not {e.wording for e in made.train + made.validation} & {"held out"}
    held_out = sum(e.wording == "held out" for e in made.test)
    assert 0.4 < held_out / len(made.test) < 0.8


def test_half_of_the_made_up_messages_got_a_reply(made: Exchanges) -> None:
    for part in made:
        assert sum(bool(exchange.reply) for exchange in part) == pytest.approx(len(part) / 2, rel=0.2)
    assert all(bool(exchange.reply) == bool(exchange.cluster) for part in made for exchange in part)
    clusters: dict[str, set[str]] = {}
    for exchange in made.train:
        clusters.setdefault(exchange.cluster, set()).add(exchange.reply)
    assert len(clusters) > 30
    assert clusters["welcome"] == {"You're welcome!", "My pleasure.", "Happy to help."}
    replies = [reply for same in clusters.values() for reply in same]
    assert len(replies) == len(set(replies)), "a reply is in one cluster"


def test_what_a_reply_speaks_of_is_in_its_message(made: Exchanges) -> None:
    named = [e for part in made for e in part if e.reply.endswith("day works for me.")]
    assert len(named) > 20
    assert all(e.reply.split()[0] in e.message for e in named)
    assert not any("{" in e.message + e.reply for part in made for e in part)


def test_the_seed_decides(made: Exchanges) -> None:
    assert read_exchanges("", 3000, seed=0) == made
    assert read_exchanges("", 3000, seed=1) != made


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_files_are_read(kind: str, tmp_path: Path) -> None:
    rows = [*lines(), ("  Lunch \u00e9 at  99?", "Oh,  yes!", "accept")]
    found = {e.message: e for part in read_exchanges(str(written(tmp_path / f"it.{kind}", rows)), 0, 0) for e in part}
    assert len(found) == 61
    assert (found["Lunch at 1?"].reply, found["Lunch at 1?"].cluster) == ("Sure!", "sure")
    assert found["Lunch at 2?"].cluster == plain("NO sorry") == "no sorry"
    assert found["Lunch at 3?"].reply == ""
    assert (found["Lunch \u00e9 at 99?"].reply, found["Lunch \u00e9 at 99?"].cluster) == ("Oh, yes!", "accept")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("it.tsv", "Lunch?\tSure!\n", "both kinds are needed"),
        ("it.tsv", "\tSure!\n", "Row 1 of .* must hold a message"),
        ("it.jsonl", '{"message": 3}\n', "must hold a message"),
        ("it.jsonl", "[1]\n", "must be an object"),
        ("it.jsonl", "{\n", "cannot be read"),
        ("it.txt", "Lunch?\n", r"must end with \.tsv"),
        ("it.tsv", b"\xff\xff", "cannot be read"),
    ],
)
def test_other_files_are_refused(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        read_exchanges(str(file), 0, 0)


def test_a_name_that_is_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="neither a file nor a Hugging Face data set"):
        read_exchanges(str(tmp_path / "nothing.tsv"), 0, 0)
