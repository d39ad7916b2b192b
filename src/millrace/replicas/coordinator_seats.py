"""Who is there in a synchronous collective run, who sits on which seat, and what they are told.

The lower layer of the state machine in `coordinator`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from millrace.replicas.protocol import NOTHING, DriverCommand, Expect, Fields, StartMembers, Stop, Story, Tell

# What a member is doing, as the driver knows it. The first three need no answer.
SPARE, FREE, READY = "spare", "free", "ready"  # no role yet; in no group; in the group, idle
ROLE, FORM, STEP, READ, ABANDON = "role", "form", "step", "read", "abandon"  # was told so, and has not answered
IN_GROUP = (FORM, STEP, READ)  # has to abandon before another group is formed
OWES = frozenset({ROLE, *IN_GROUP, ABANDON})


@dataclass(frozen=True)
class Member:
    """What the driver knows of a process that has joined.

    seat: its place among the workers, which is the slice it normally computes; None: a spare.
    committed: the step of its variables. awaited: the next group is not formed before it has taken its role.
    """

    doing: str = SPARE
    seat: int | None = None
    committed: int = NOTHING
    awaited: bool = False


class CoordinatorSeats:
    """The members of a run. All attributes are immutable values, or dicts of such.

    seats: slices of the step in flight, and places for workers. replicas: the same from the next step on. spares: how
    many members without a role to keep. initial: the step of the variables that the run starts with. reported: the last
    step reported done. losses: members lost since then.
    """

    def __init__(self, replicas: int, spares: int, committed: int, max_losses: int | None) -> None:
        self.replicas = self.seats = replicas
        self.spares = spares
        self.initial = self.reported = committed
        self.max_losses = max_losses
        self.members: dict[str, Member] = {}  # in the order in which they joined
        self.stopped: frozenset[str] = frozenset()  # and not heard to have ended
        self.starting = 0
        self.losses = 0
        self._commands: list[DriverCommand] = []

    def _workers(self, *doing: str) -> tuple[str, ...]:
        """Members with a seat that are doing one of these, by seat."""
        seated = [(m.seat, name) for name, m in self.members.items() if m.seat is not None and m.doing in doing]
        return tuple(name for _, name in sorted(seated))

    def _awaited(self) -> bool:
        return any(member.awaited for member in self.members.values())

    def _furthest(self) -> int:
        return max((self.members[name].committed for name in self._workers(FREE, READY)), default=NOTHING)

    def _resize(self, seats: int) -> None:
        """Change the number of seats; whoever loses its seat ends. Only in an idle group: there nobody is behind."""
        self._story(f"{seats} seats instead of {self.seats}")
        self.seats = seats
        for name, member in list(self.members.items()):
            if member.seat is not None and member.seat >= seats:
                self._stop(name)
        self._fill_seats(warm=True)

    def _fill_seats(self, warm: bool) -> None:
        """Empty seats go to spares, missing members are started, superfluous spares end."""
        taken = {member.seat for member in self.members.values()}
        empty = [seat for seat in range(self.seats) if seat not in taken]
        spares = [name for name, member in self.members.items() if member.doing == SPARE]
        for seat, name in zip(empty, spares, strict=False):
            committed = self.initial if self.reported == self.initial else NOTHING
            self.members[name] = Member(SPARE, seat, committed, awaited=warm)
            self._tell(name, "role", {"committed": committed}, ROLE)
        there = len(self.members) + self.starting
        missing = self.replicas + self.spares - there
        limit = 3 * (self.replicas + self.spares) if self.max_losses is None else self.max_losses
        if missing > 0 and self.losses < limit:
            self.starting += missing
            self._story(f"{missing} more members are started")
            self._commands.append(StartMembers(missing))
        superfluous = there - max(self.replicas, self.seats) - self.spares
        for name in spares[len(empty) :][: max(superfluous, 0)]:
            self._stop(name)

    def _tell(self, name: str, kind: str, fields: Fields, doing: str) -> None:
        self._commands.append(Tell(name, kind, fields))
        self._set(name, doing)

    def _set(self, name: str, doing: str, committed: int | None = None) -> None:
        """What a member is doing from now on; whoever owes an answer is expected to give it."""
        member = self.members[name]
        committed = member.committed if committed is None else committed
        self.members[name] = replace(member, doing=doing, committed=committed, awaited=member.awaited and doing == ROLE)
        self._story(f"{name}: {member.doing} → {doing}, step {committed} committed")
        if doing != member.doing:
            self._commands.append(Expect(name, doing if doing in OWES else None))

    def _stop(self, name: str) -> None:
        del self.members[name]
        self.stopped |= {name}
        self._story(f"{name} is not needed any more")
        self._commands.append(Stop(name))

    def _story(self, text: str) -> None:
        self._commands.append(Story(text))

    def _taken(self) -> list[DriverCommand]:
        commands, self._commands = self._commands, []
        return commands
