"""What the driver of a run over parameter servers knows of its members, its shards and the steps in flight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from millrace.replicas.pool_events import Sizes

Work: TypeAlias = tuple[int, int]  # step, slice

# What a member is doing, as the driver knows it: the last four are workers.
# One that leaves is ending because it is not needed any more, and no loss.
SPARE, SHARD, ENDING, LEAVING = "spare", "shard", "ending", "leaving"
ROLE, FREE, WORK, FLUSH = "role", "free", "work", "flush"
WORKERS = (ROLE, FREE, WORK, FLUSH)

# A shard's process, and that of its copy.
EMPTY, STARTING, UP, PROMOTING = "empty", "starting", "up", "promoting"
READY, SENDING, FOLLOWING = "ready", "sending", "following"  # of the copy, after STARTING


@dataclass(frozen=True)
class Member:
    """What the driver knows of a process that has joined.

    work: what it works at. holds: what it was given and has not said it pushed. clock: how many batches it has done, as
    the bound counts them. slice: the last one it was given.
    """

    doing: str = SPARE
    work: Work | None = None
    holds: tuple[Work, ...] = ()
    clock: int = 0
    slice: int = -1


@dataclass(frozen=True)
class Place:
    """A shard: who holds it, who its copy.

    needed: what it was last configured with. owes: what it was told and has not answered. waiting: workers that have no
    answer from it while it sends its copy all it is to have. excused: workers that may have had none for that reason,
    and may say so once.
    """

    state: str = EMPTY
    holder: str = ""
    address: str = ""
    copy: str = ""
    copy_state: str = EMPTY
    copy_address: str = ""
    needed: int = 0
    owes: frozenset[str] = frozenset()
    waiting: tuple[str, ...] = ()
    excused: frozenset[str] = frozenset()

    def owed_by(self, name: str) -> str:
        """What its holder, or the process of its copy, is to do; "" for nothing."""
        if name == self.copy:
            return STARTING if self.copy_state == STARTING else ""
        sending = {"copy"} if self.copy_state == SENDING else set()
        return self.state if self.state != UP else ", ".join(sorted(self.owes | sending))


@dataclass(frozen=True)
class Step:
    """A step that is wanted and not done. pushed: slices whose workers have said that they pushed them. passed: shards
    that have made its update."""

    slices: int
    needed: int
    pushed: frozenset[int] = frozenset()
    passed: frozenset[int] = frozenset()

    def after(self, slice_: int, passed: set[int]) -> Step:
        """After a slice was pushed to all shards, of which these have made the update."""
        return replace(self, pushed=self.pushed | {slice_}, passed=self.passed | passed)

    def is_done(self, sizes: Sizes) -> bool:
        """Whether all that is needed has been pushed, and in sync mode every shard has made the update."""
        enough = len(self.pushed) >= self.needed and len(self.passed) == sizes.servers
        return len(self.pushed) == self.slices or (sizes.sync and enough)
