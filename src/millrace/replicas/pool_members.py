"""What the driver of a run over parameter servers knows of its members, and what it tells them.

The first of three layers of its state machine: members here, who holds which shard in `pool_shards`, who works at what
in `pool`.
"""

from __future__ import annotations

from dataclasses import replace

from millrace.replicas.pool_events import Kill, PoolCommand, Sizes
from millrace.replicas.pool_state import ENDING, LEAVING, SPARE, Member
from millrace.replicas.protocol import Failed, Fields, StartMembers, Story, Tell


class PoolMembers:
    """Attributes: members: in the order in which they joined. starting: processes that have not joined yet. losses:
    members lost since a step was done."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.members: dict[str, Member] = {}
        self.starting = self.losses = 0
        self.failed = False
        self._commands: list[PoolCommand] = []

    def _of(self, *doing: str) -> list[str]:
        return [name for name, member in self.members.items() if member.doing in doing]

    def _spare(self) -> str:
        return next(iter(self._of(SPARE)), "")

    def _total(self) -> int:
        sizes = self.sizes
        return sizes.servers * (1 + sizes.copies) + sizes.workers + sizes.spares

    def _start_missing(self) -> None:
        alive = sum(member.doing not in (ENDING, LEAVING) for member in self.members.values())
        missing = self._total() - alive - self.starting
        if missing > 0:
            self.starting += missing
            self._story(f"{missing} more members are started")
            self._commands.append(StartMembers(missing))

    def _count_loss(self, what: str) -> None:
        self.losses += 1
        limit = self.sizes.max_losses
        limit = 3 * self._total() if limit is None else limit
        if self.losses > limit and not self.failed:
            self._fail(f"{self.losses} processes were lost without a step in between; the last one, {what}")

    def _give_role(self, name: str, doing: str, fields: Fields) -> None:
        self._set(name, Member(doing))
        self._story(f"{name} is to be {dict(fields)}")
        self._tell(name, "role", fields)

    def _set(self, name: str, member: Member) -> None:
        self.members[name] = member

    def _tell(self, name: str, kind: str, fields: Fields | None = None) -> None:
        self._commands.append(Tell(name, kind, fields or {}))

    def _kill(self, name: str, why: str) -> None:
        if self.members[name].doing not in (ENDING, LEAVING):
            self._set(name, replace(self.members[name], doing=ENDING))
            self._story(f"{name} is to end: {why}")
            self._commands.append(Kill(name, why))

    def _end(self, name: str) -> None:
        self._kill(name, "it is not needed any more")
        self._set(name, replace(self.members[name], doing=LEAVING))

    def _fail(self, reason: str, variables_lost: bool = False) -> None:
        self.failed = True
        self._story(reason)
        self._commands.append(Failed(reason, variables_lost))

    def _story(self, text: str) -> None:
        self._commands.append(Story(text))

    def _taken(self) -> list[PoolCommand]:
        commands, self._commands = self._commands, []
        return commands
