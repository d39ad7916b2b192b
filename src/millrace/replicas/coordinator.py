"""What the driver of a synchronous collective run does next: a state machine without I/O, clocks or tensors.

It decides who is in which group, who computes which slices, and which step is done; who is a worker is decided in
`coordinator_seats`. What it builds on:

- A worker has committed all that it can before it answers "abandon", so that after the answers of all survivors nothing
  moves, and the furthest of them has the state of a run without faults.
- A step is reported done when every worker of the group has committed it, never before: from then on it is lost only
  with all of them.

See docs/replicas-protocol.md; checked for all orders of events on a small scale by tests/replicas/test_model_check.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from millrace.errors import WorkerError
from millrace.replicas.coordinator_seats import (
    ABANDON,
    FORM,
    FREE,
    IN_GROUP,
    READ,
    READY,
    ROLE,
    SPARE,
    STEP,
    CoordinatorSeats,
    Member,
)
from millrace.replicas.protocol import (
    DriverCommand,
    DriverEvent,
    Failed,
    Fields,
    Joined,
    Lost,
    ReadWanted,
    Resized,
    Said,
    StepDone,
    StepWanted,
    VariablesRead,
)
from millrace.replicas.shares import share_slices

# Phases of the driver.
GATHERING, FORMING, IDLE, STEPPING, FAILED = "gathering", "forming", "idle", "stepping", "failed"


@dataclass(frozen=True)
class Flight:
    """A step that is wanted and not reported done. slices: by worker, once handed out. computed: whose
    results have come."""

    step: int
    weights: tuple[float, ...]
    slices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()


class Coordinator(CoordinatorSeats):
    """The deciding half of the driver. All attributes are immutable values, or dicts of such.

    phase: gathering (until nothing moves any more and a group can be formed), forming, idle (in a group, no step),
    stepping, failed. generation, group: the last one formed, and who is in it, by rank. breaks: groups that broke
    without a loss since a step was done. flight: the step that is wanted. Of the rest, see `CoordinatorSeats`.
    """

    def __init__(
        self,
        replicas: int,
        *,
        spares: int = 0,
        committed: int = 0,
        max_losses: int | None = None,
        max_breaks: int = 3,
    ) -> None:
        """A driver before its first event.

        Args: spares: how many members without a role to keep. committed: the step of the variables that the run starts
            with. max_losses: so many without a step in between, and no more members are started (default: three times
            all members). max_breaks: so many groups may break in a row although all their members live.
        """
        super().__init__(replicas, spares, committed, max_losses)
        self.max_breaks = max_breaks
        self.phase = GATHERING
        self.generation = 0
        self.group: tuple[str, ...] = ()
        self.breaks = 0
        self.last_loss = "nobody was lost"
        self.flight: Flight | None = None
        self.read_wanted = False

    @property
    def complete(self) -> bool:
        """Whether all workers are in the group, and all spares there."""
        spares = sum(member.doing == SPARE for member in self.members.values())
        return len(self.group) == self.seats and spares == self.spares and not self._workers(FREE, ROLE, FORM, ABANDON)

    @property
    def up_to_date(self) -> tuple[str, ...]:
        """Who has the variables of the last step that was reported done. For any thread."""
        return tuple(name for name, member in list(self.members.items()) if member.committed >= self.reported)

    def start(self) -> list[DriverCommand]:
        """What to do before the first event."""
        self._settle()
        return self._taken()

    def handle(self, event: DriverEvent) -> list[DriverCommand]:
        """What to do now, in this order.

        Raises: WorkerError when a step is wanted out of turn, or a worker says what cannot be.
        """
        if self.phase == FAILED:
            return []
        match event:
            case Joined(member):
                self.starting -= 1
                self.members[member] = Member()
                self._story(f"{member} has joined")
            case Lost(member, why):
                self._lost(member, why)
            case Said(member, kind, fields):
                self._said(member, kind, fields)
            case StepWanted(step, weights):
                self._want(step, weights)
            case Resized(replicas):
                self.replicas = replicas
                self._story(f"{replicas} replicas from the next step on")
            case ReadWanted():
                self.read_wanted = True
                self._story("the variables are wanted")
        # Who stands by is waited for; who has just joined is not, and is taken in between two steps.
        self._settle(warm=not isinstance(event, Joined) or self.generation == 0)
        return self._taken()

    # --- events -------------------------------------------------------------------------------------------------------

    def _want(self, step: int, weights: tuple[float, ...]) -> None:
        if self.flight is not None or step != self.reported + 1 or len(weights) != self.replicas:
            raise WorkerError(
                f"A step {step} of {len(weights)} slices was asked for; expected was step {self.reported + 1} of "
                f"{self.replicas}, after the one before it is done. Give one step at a time, a slice to each replica."
            )
        self.flight = Flight(step, weights)
        self._story(f"step {step} of {len(weights)} slices is wanted")

    def _lost(self, name: str, why: str) -> None:
        if name in self.stopped:
            self.stopped -= {name}
            self._story(f"{name} has ended as it was to: {why}")
            return
        self.losses, self.breaks, self.last_loss = self.losses + 1, 0, f"{name}: {why}"
        member = self.members.pop(name, None)
        if member is None:
            self.starting -= 1
            self._story(f"{name} was started and never joined: {why}")
            return
        self._story(f"{name} was lost, seat {member.seat}, doing {member.doing!r}: {why}")
        if member.seat is not None and member.doing not in (FREE, ROLE):
            self._gather(f"{name} was lost")

    def _said(self, name: str, kind: str, fields: Fields) -> None:
        member = self.members.get(name)
        if member is None or fields.get("generation", self.generation) != self.generation:
            self._story(f"dropped {kind!r} of {name}: it is gone, or speaks of an earlier generation")
            return
        match kind, member.doing:
            case "ready", "role":
                self._set(name, FREE, committed=fields["committed"])
            case "formed", "form":
                self._set(name, READY, committed=fields["committed"])
            case "computed", "step" | "abandon":
                self._computed(name, fields["step"])
            case "done", "step" | "abandon":
                self._set(name, READY if member.doing == STEP else ABANDON, committed=fields["step"])
            case "abandoned", "abandon":
                self._set(name, FREE, committed=fields["committed"])
            case "values", "read" | "abandon":
                self.read_wanted = False
                self._commands.append(VariablesRead(name, fields["committed"], fields))
                self._set(name, READY if member.doing == READ else ABANDON)
            case "broken", "form" | "step":
                self._broken(name, fields["why"])
            case (("formed" | "broken"), "abandon"):
                self._story(f"{name} says {kind!r}, and will answer 'abandon' next")
            case _:
                raise WorkerError(
                    f"{name} says {kind!r} ({dict(fields)}), and the driver takes it for {member.doing!r} in "
                    f"generation {self.generation}. They disagree on what came before; please report both logs."
                )

    def _computed(self, name: str, step: int) -> None:
        if self.flight is None or self.flight.step != step:
            raise WorkerError(f"{name} has results of step {step}, and {self.flight} is what was handed out.")
        self._story(f"{name} has computed its slices of step {step}")
        self.flight = replace(self.flight, computed=self.flight.computed | {name})

    def _broken(self, name: str, why: str) -> None:
        self.breaks += 1
        self._gather(f"the group broke at {name}: {why}")
        if self.breaks > self.max_breaks:
            self._fail(
                f"the group broke {self.breaks} times in a row though all its members live; last at {name}: {why}"
            )

    # --- deciding -----------------------------------------------------------------------------------------------------

    def _settle(self, warm: bool = True) -> None:
        """Everything that follows from where we stand. warm: a seat that falls to somebody now is worth waiting for."""
        if self.phase == FAILED:
            return
        self._fill_seats(warm)
        if self.phase == GATHERING and self._hopeless():
            self._fail(
                f"nobody who has the newest variables is left; last loss: {self.last_loss}",
                variables_lost=self.reported > self.initial,
            )
        if self.phase == GATHERING and self._gathered():
            self._form()
        if self.phase == FORMING and not self._workers(FORM):
            self._enter(IDLE, f"generation {self.generation} is formed")
            self._finish(self._furthest())
        if self.phase == STEPPING and not self._workers(STEP):
            self._enter(IDLE, f"all workers of generation {self.generation} are done")
            self._finish(self._furthest())
        if self.phase == IDLE:
            self._next()

    def _next(self) -> None:
        """In a group that is idle: read, or take in who is new, or hand out the step that is wanted."""
        if self.read_wanted and not self._workers(READ):
            self._tell(self.group[0], "read", {"generation": self.generation}, READ)
        if self._workers(READ) or self.flight is None:
            return
        if self.seats != len(self.flight.weights):
            self._resize(len(self.flight.weights))
        if self._awaited() or self._workers(READY, FREE) != self.group:
            self._gather("the group is to change")
            self._settle()
        else:
            self._hand_out(self.flight)

    def _hopeless(self) -> bool:
        """Whether nobody can have the variables of what was reported. At first, whoever starts is given them.

        Who has yet to answer "abandon" may just have taken them from one who is lost now.
        """
        coming = self.starting > 0 and self.reported == self.initial
        can_have = (m.doing == ABANDON or m.committed >= self.reported for m in self.members.values())
        return not coming and not any(can_have)

    def _gathered(self) -> bool:
        """Whether nothing moves, and nobody is on the way who is worth waiting for."""
        at_first = self.generation == 0 and self.starting > 0
        everybody = sum(member.seat is not None for member in self.members.values()) == self.seats
        return not self._workers(ABANDON) and not self._awaited() and (everybody or not at_first)

    def _gather(self, why: str) -> None:
        """Give up the group: who is doing something in it is told to abandon that."""
        self._enter(GATHERING, why)
        for name in self._workers(*IN_GROUP):
            self._tell(name, "abandon", {"generation": self.generation}, ABANDON)

    def _form(self) -> None:
        """Make the next generation of all who can be in it; those behind take the variables of one who is furthest."""
        group, furthest = self._workers(FREE, READY), self._furthest()
        if furthest < self.reported:
            return  # who has the variables is still on the way
        self.generation += 1
        behind = [rank for rank, name in enumerate(group) if self.members[name].committed < furthest]
        source = next(rank for rank in range(len(group)) if rank not in behind) if behind else None
        self.group = group
        self._enter(FORMING, f"generation {self.generation} of {', '.join(group)} at step {furthest}, behind: {behind}")
        same = {"generation": self.generation, "size": len(group), "source": source, "behind": behind, "step": furthest}
        for rank, name in enumerate(group):
            self._tell(name, "form", {**same, "rank": rank}, FORM)

    def _hand_out(self, flight: Flight) -> None:
        seats = [seat for name in self.group if (seat := self.members[name].seat) is not None]
        shares = dict(zip(self.group, share_slices(seats, self.seats), strict=True))
        self.flight = replace(flight, slices=shares, computed=frozenset())
        self._enter(STEPPING, f"step {flight.step}: {shares}")
        same = {"generation": self.generation, "step": flight.step, "total": sum(flight.weights)}
        for name, slices in shares.items():
            weights = [flight.weights[slice_] for slice_ in slices]
            self._tell(name, "step", {**same, "slices": list(slices), "weights": weights}, STEP)

    def _finish(self, committed: int) -> None:
        """Report the step in flight, if that is what everybody has committed."""
        flight = self.flight
        if flight is None or committed != flight.step:
            return
        missing = sorted(s for name, slices in flight.slices.items() if name not in flight.computed for s in slices)
        slices = {name: of_it for name, of_it in flight.slices.items() if name in flight.computed}
        self.flight, self.reported, self.losses, self.breaks = None, flight.step, 0, 0
        self._story(f"step {flight.step} is done" + (f", results of slices {missing} are lost" if missing else ""))
        self._commands.append(StepDone(flight.step, slices, tuple(missing)))

    # --- small things -------------------------------------------------------------------------------------------------

    def _enter(self, phase: str, why: str) -> None:
        self._story(f"{self.phase} → {phase}: {why}")
        self.phase = phase

    def _fail(self, reason: str, variables_lost: bool = False) -> None:
        self._enter(FAILED, reason)
        self._commands.append(Failed(reason, variables_lost))
