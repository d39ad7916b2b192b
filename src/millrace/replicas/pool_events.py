"""What the driver of a run over parameter servers is told (events), and what it then wants done (commands).

What it has in common with the driver of a collective run is in `protocol`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from millrace.replicas.protocol import (
    Expect,
    Failed,
    Joined,
    Lost,
    ReadWanted,
    Resized,
    Said,
    StartMembers,
    Story,
    Tell,
)


@dataclass(frozen=True)
class Sizes:
    """How many processes do what, and how workers agree.

    copies: whether every shard has a copy on another process. spares: members without a role. sync: whether the pushes
    of a step become one update. bound: how many batches a worker may be ahead of the slowest one, None for any.
    max_losses: so many without a step in between, and the run is given up (default: three times all members).
    group: how many processes a worker is.
    """

    servers: int
    workers: int
    copies: bool = True
    spares: int = 1
    sync: bool = False
    bound: int | None = None
    max_losses: int | None = None
    group: int = 1


@dataclass(frozen=True)
class Wanted:
    """A step is to be computed: a batch (async: one slice), or the slices of one.

    needed: how many of them its update waits for.
    """

    step: int
    slices: int = 1
    needed: int = 1


@dataclass(frozen=True)
class FlushWanted:
    """Whatever workers have not pushed yet is to be pushed."""


@dataclass(frozen=True)
class WriteWanted:
    """Every shard is to be given values by the driver. Nothing is in flight."""


PoolEvent: TypeAlias = Joined | Lost | Said | Wanted | FlushWanted | ReadWanted | WriteWanted | Resized


@dataclass(frozen=True)
class Kill:
    """End a member; its `Lost` will come."""

    member: str
    why: str


@dataclass(frozen=True)
class Done:
    """A step has been pushed, and what its update needs is applied. slices: those whose results have come."""

    step: int
    slices: tuple[int, ...]


@dataclass(frozen=True)
class AllRead:
    """Every shard has said its variables. members: who said them, by shard."""

    members: tuple[str, ...]


@dataclass(frozen=True)
class AllWritten:
    """Every shard has what the driver gave it."""


PoolCommand: TypeAlias = Tell | StartMembers | Kill | Expect | Done | AllRead | AllWritten | Failed | Story
