"""What a worker of a synchronous collective run does next: a state machine without I/O, clocks or tensors.

It knows two things that nobody else knows: which step its variables are of (`committed`), and whether it may leave its
group. An update that has begun is always finished before the worker answers "abandon": the answer says which step it
has committed, and the driver builds on that. See docs/replicas-protocol.md; checked for all orders of events on a small
scale by tests/replicas/test_model_check.py.
"""

from __future__ import annotations

from millrace.errors import WorkerError
from millrace.replicas.protocol import (
    NOTHING,
    Adopt,
    AllReduce,
    Broadcast,
    CollectiveFailed,
    Computed,
    ComputeSlices,
    Fields,
    Formed,
    FormGroup,
    LeaveGroup,
    Reduced,
    Say,
    Story,
    Told,
    Update,
    Updated,
    WorkerCommand,
    WorkerEvent,
)

# What `doing` can be, and from which of these an "abandon" is answered at once.
FREE, FORMING, ADOPTING, READY = "free", "forming", "adopting", "ready"
COMPUTING, REDUCING, UPDATING, BROKEN = "computing", "reducing", "updating", "broken"
WRITING = frozenset({ADOPTING, UPDATING})  # the variables are being changed: never broken off
IN_COLLECTIVE = frozenset({FORMING, COMPUTING, REDUCING})  # COMPUTING: a shell may reduce early what is ready early


class WorkerState:
    """The deciding half of a worker. All attributes are plain immutable values.

    doing: free (in no group), forming, adopting (taking broadcast variables), ready (in a group, no step), computing,
    reducing, updating, or broken (its collective failed; it waits for the driver).
    committed: the step its variables are of. generation: of the last group it was told to form.
    """

    def __init__(self) -> None:
        self.doing = FREE
        self.generation = 0
        self.committed = NOTHING
        self.step: int | None = None  # in flight: handed out and not committed here
        self.behind = False  # takes the variables that are broadcast in the group being formed
        self.broadcast_step = NOTHING
        self.abandoning = False  # an "abandon" waits until the variables are whole again

    def handle(self, event: WorkerEvent) -> list[WorkerCommand]:
        """What to do now, in this order.

        Raises: WorkerError when the driver asks for what cannot be; the worker must end then, not guess.
        """
        if isinstance(event, Told):
            return self._told(event.kind, event.fields)
        if event.generation == self.generation:
            match event:
                case Formed() if self.doing == FORMING:
                    return self._formed()
                case Computed(step=step) if self.doing == COMPUTING and step == self.step:
                    self.doing = REDUCING
                    # First its results: once others have its gradients, they must not be lost with it.
                    found = Say("computed", {"generation": self.generation, "step": step})
                    return [found, AllReduce(self.generation, step)]
                case Reduced(step=step) if self.doing == REDUCING and step == self.step:
                    self.doing = UPDATING
                    return [Update(self.generation, step)]
                case Updated(step=step) if self.doing in WRITING:
                    return self._updated(step)
                case CollectiveFailed(why=why) if self.doing in IN_COLLECTIVE:
                    self.doing = BROKEN
                    return [Say("broken", {"generation": self.generation, "why": why})]
        return [Story(f"dropped {event}: {self._standing()}")]

    def _told(self, kind: str, fields: Fields) -> list[WorkerCommand]:
        if kind == "role":
            self.committed = fields["committed"]
            return [Say("ready", {"committed": self.committed})]
        generation = fields["generation"]
        if kind == "form" and generation > self.generation:
            return self._form(generation, fields)
        if generation < self.generation:
            return [Story(f"dropped {kind!r} of generation {generation}: {self._standing()}")]
        match kind:
            case "abandon":
                return self._abandon()
            case "step" if self.doing == READY and fields["step"] == self.committed + 1:
                return self._begin(fields)
            case "read" if self.doing == READY:
                return [Say("values", {"generation": self.generation, "committed": self.committed})]
        raise WorkerError(
            f"This worker was told {kind!r} ({dict(fields)}) and cannot do that: {self._standing()}. "
            "Driver and worker disagree on what came before; please report this with both logs."
        )

    def _form(self, generation: int, fields: Fields) -> list[WorkerCommand]:
        if self.doing not in (FREE, READY):
            raise WorkerError(
                f"This worker was told to form generation {generation} and has not left its group: {self._standing()}. "
                "The driver must tell it to abandon that and wait for the answer."
            )
        leave: list[WorkerCommand] = [LeaveGroup(self.generation)] if self.doing == READY else []
        rank, source = fields["rank"], fields["source"]
        self.doing, self.generation, self.step = FORMING, generation, None
        self.behind, self.broadcast_step = rank in fields["behind"], fields["step"]
        commands: list[WorkerCommand] = [*leave, FormGroup(generation, rank, fields["size"])]
        if source is not None:
            commands.append(Broadcast(generation, source, tuple(fields["behind"]), fields["step"]))
        return commands

    def _formed(self) -> list[WorkerCommand]:
        if self.behind:
            self.doing = ADOPTING
            return [Adopt(self.generation, self.broadcast_step)]
        self.doing = READY
        return [Say("formed", {"generation": self.generation, "committed": self.committed})]

    def _begin(self, fields: Fields) -> list[WorkerCommand]:
        self.doing, self.step = COMPUTING, fields["step"]
        slices, weights = tuple(fields["slices"]), tuple(fields["weights"])
        return [ComputeSlices(self.generation, fields["step"], slices, weights, fields["total"])]

    def _updated(self, step: int) -> list[WorkerCommand]:
        kind, told = ("done", {"step": step}) if self.doing == UPDATING else ("formed", {"committed": step})
        self.doing, self.committed, self.step = READY, step, None
        said = Say(kind, {"generation": self.generation, **told})
        return [said, *self._leave()] if self.abandoning else [said]

    def _abandon(self) -> list[WorkerCommand]:
        if self.doing == FREE:
            return [Story(f"dropped 'abandon': {self._standing()}")]
        if self.doing in WRITING:
            self.abandoning = True
            return [Story(f"'abandon' waits for the end of the update: {self._standing()}")]
        return self._leave()

    def _leave(self) -> list[WorkerCommand]:
        self.doing, self.step, self.abandoning = FREE, None, False
        answer = {"generation": self.generation, "committed": self.committed}
        return [LeaveGroup(self.generation), Say("abandoned", answer)]

    def _standing(self) -> str:
        return f"{self.doing} in generation {self.generation}, step {self.committed} committed, {self.step} in flight"
