"""Counts the bytes of all tensors that a worker takes and gives, in files of the directory that `COUNTED` names.

What a shard is given when it begins, and programs, are left out. A process counts when it imports this. The files are
called after the process, and have lines such as "pushed rows 96".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from millrace.replicas.collective import Group
from millrace.replicas.line import Line
from millrace.replicas.shard_clients import ShardClients
from millrace.replicas.shard_store import Rows
from millrace.runtime.messages import Message

COUNTED = "COUNTED_BYTES"


def counted(directory: Path) -> Counter[str]:
    """What all processes have counted."""
    found: Counter[str] = Counter()
    for path in directory.iterdir():
        for line in path.read_text().splitlines():
            what, _, count = line.rpartition(" ")
            found[what] += int(count)
    return found


def _count(what: str, tensors: Iterable[Tensor]) -> None:
    with (Path(os.environ[COUNTED]) / str(os.getpid())).open("a") as file:
        file.write(f"{what} {sum(tensor.nbytes for tensor in tensors)}\n")


def _wrap(owner: type, name: str, count: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        count(*given, **named)
        return method(self, *given, **named)

    setattr(owner, name, counting)


def _fetch(into: Mapping[str, Tensor], step: int = 0, rows: Mapping[str, Rows] | None = None) -> None:
    _count("fetched whole", into.values())
    _count("fetched rows", (wanted.values for wanted in (rows or {}).values()))


def _push(gradients: Mapping[str, Tensor], *given: Any, rows: Mapping[str, Rows] | None = None, **named: Any) -> None:
    _count("pushed whole", gradients.values())
    _count("pushed rows", (given.values for given in (rows or {}).values()))


def _say(message: Message) -> None:
    _count("said", message.tensors.values())


def _broadcast(tensors: Sequence[Tensor], source: int) -> None:
    _count("broadcast", tensors)


def _all_reduce(tensors: Sequence[Tensor], weight: float) -> None:
    _count("added up", tensors)


def _hear(line: Line, within_s: float, hear: Callable[[Line, float], Message | None] = Line.next) -> Message | None:
    message = hear(line, within_s)
    if message is not None and message.kind != "program" and message.fields.get("role") != "shard":
        _count("heard", message.tensors.values())
    return message


if COUNTED in os.environ:
    _wrap(ShardClients, "fetch", _fetch)
    _wrap(ShardClients, "push", _push)
    _wrap(Group, "broadcast", _broadcast)
    _wrap(Group, "all_reduce", _all_reduce)
    _wrap(Line, "say", _say)
    Line.next = _hear  # type: ignore[method-assign]
