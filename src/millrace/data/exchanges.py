"""Messages and the short replies they got: from a user's files, or made up by `made_up_exchanges`."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from millrace.data.made_up_exchanges import made_up
from millrace.data.randomness import derived_seed
from millrace.errors import DataError

_PARTS = 10  # of as many messages one is for validation and one for the test


@dataclass(frozen=True)
class Exchange:
    """One message. Replies of one cluster mean the same, so that nobody needs two of them to choose from."""

    message: str
    reply: str  # "" for a message that got no short reply
    cluster: str
    wording: str = ""  # of a made-up message: "held out" when nothing that is trained on is worded so


class Exchanges(NamedTuple):
    """In parts that share no message."""

    train: list[Exchange]
    validation: list[Exchange]
    test: list[Exchange]


def read_exchanges(source: str, count: int, seed: int) -> Exchanges:
    """Exchanges, divided by message.

    Args:
        source: a file of lines "message<tab>reply" (and perhaps "<tab>cluster"), *.tsv, or of JSON objects with these
            names, *.jsonl; the name of a Hugging Face data set with columns of these names; "" for made-up ones. A
            message without a reply did not get a short one. Without clusters, replies that differ in case and
            punctuation alone mean the same.
        count: of made-up ones.
        seed: of made-up ones.

    Raises: DataError: there is no such file or data set, or it holds something else.
    """
    if not source:
        found = [Exchange(*row) for row in made_up(count, seed)]
    else:
        rows = _file_rows(Path(source)) if Path(source).is_file() else _hub_rows(source)
        found = [_exchange(row, number, source) for number, row in enumerate(rows, 1)]
    parts = Exchanges([], [], [])
    for exchange in {exchange.message: exchange for exchange in found}.values():
        number = derived_seed("exchange", exchange.message) % _PARTS
        if exchange.wording == "held out":  # more of these than of all others, if all were kept
            parts.test.extend([exchange] if number < _PARTS // 2 else [])
        else:
            (parts.test if number == 1 else parts.validation if number == 0 else parts.train).append(exchange)
    for name, part in parts._asdict().items():
        replied = sum(bool(exchange.reply) for exchange in part)
        if not 0 < replied < len(part):
            raise DataError(
                f"The {name} part has {len(part)} messages, of which {replied} got a reply: both kinds are needed in "
                "each part. Give more messages, some of them with an empty reply."
            )
    return parts


def plain(text: str) -> str:
    """A text without case, punctuation and double blanks."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _exchange(row: Mapping[str, Any], number: int, source: str) -> Exchange:
    message, reply, cluster = (row.get(name) or "" for name in ("message", "reply", "cluster"))
    if not isinstance(message, str) or not isinstance(reply, str) or not message.strip():
        raise DataError(
            f"Row {number} of {source} must hold a message and a reply (which may be empty) as text, but got "
            f"{dict(row)!r}."
        )
    return Exchange(" ".join(message.split()), " ".join(reply.split()), str(cluster) or plain(reply))


def _file_rows(file: Path) -> Iterable[Mapping[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
        elif file.suffix == ".tsv":
            table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [dict(zip(("message", "reply", "cluster"), row, strict=False)) for row in table if row]
        else:
            raise DataError(f"{file} must end with .tsv (message, tab, reply) or .jsonl (an object a line).")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The exchanges in {file} cannot be read: {error}.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'Every line of {file} must be an object such as {{"message": "Lunch?", "reply": "Sure!"}}.')
    return rows


def _hub_rows(name: str) -> Iterable[Mapping[str, Any]]:
    try:
        rows = importlib.import_module("datasets").load_dataset(name, split="train")
    except Exception as error:  # whatever the library, the network or the hub make of the name
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"There is neither a file nor a Hugging Face data set (split 'train') {name!r}: {reason}"
        ) from error
    if not {"message", "reply"} <= set(rows.column_names):
        raise DataError(
            f"The data set {name!r} needs columns 'message' and 'reply', but has {', '.join(rows.column_names)}. "
            "Rename them, and write a .jsonl of it."
        )
    return rows
