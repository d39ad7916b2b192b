"""What driver and workers of a synchronous collective run say to each other, and what their deciding halves take.

`coordinator.py` (driver) and `worker_state.py` (worker) decide: an event goes in, commands come out, and nothing else
happens there. A shell around each turns what it sees into events and carries the commands out, in their order. Messages
between the two are a kind and fields that JSON can say; tensors travel beside them and are the shells' business.
docs/replicas-protocol.md has the kinds, their fields, and who owns which state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]

NOTHING = -1  # as a committed step: has no variables yet


@dataclass(frozen=True)
class Story:
    """One line of what happened, for logs and errors. Both sides leave one for every transition and dropped message."""

    text: str


# --- driver: events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A process that was started has said hello. member: its name, which no process had before and none will have."""

    member: str


@dataclass(frozen=True)
class Lost:
    """A member is gone, for good: it has ended, or was killed. A start that failed is the loss of a new name."""

    member: str
    why: str


@dataclass(frozen=True)
class Said:
    """A member sent a message."""

    member: str
    kind: str
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class StepWanted:
    """The next step's data is there. step: one more than the last. weights: of each slice, its number of examples."""

    step: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Resized:
    """From the next `StepWanted` on there will be so many slices."""

    replicas: int


@dataclass(frozen=True)
class ReadWanted:
    """The driver wants all variables, from a member that is furthest."""


DriverEvent: TypeAlias = Joined | Lost | Said | StepWanted | Resized | ReadWanted


# --- driver: commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tell:
    """Send a message to a member. One whose connection has ended is not told: its loss will come."""

    member: str
    kind: str
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class StartMembers:
    """Start so many processes. Of each there comes either `Joined`, or `Lost` with a name that never joined."""

    count: int


@dataclass(frozen=True)
class Stop:
    """End a member that is not needed any more. Its `Lost` may come, and is no loss."""

    member: str


@dataclass(frozen=True)
class Expect:
    """From now on a member has to get on with this, or be suspected; None: nothing is asked of it but beats."""

    member: str
    doing: str | None


@dataclass(frozen=True)
class StepDone:
    """A step is committed by every worker.

    slices: whose results came, by worker. missing: those whose results were lost on the way (their gradients were not).
    """

    step: int
    slices: Mapping[str, tuple[int, ...]]
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class VariablesRead:
    """The answer to `ReadWanted`: the variables after `step`, which came beside this message of `member`."""

    member: str
    step: int
    fields: Fields


@dataclass(frozen=True)
class Failed:
    """The run cannot go on. The last command there is.

    variables_lost: only for lack of variables that nobody has any more; with those of a checkpoint it could go on.
    """

    reason: str
    variables_lost: bool = False


DriverCommand: TypeAlias = Tell | StartMembers | Stop | Expect | StepDone | VariablesRead | Failed | Story


# --- worker: events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """The driver sent a message. "role" is passed on when what came beside it is loaded, the others at once."""

    kind: str
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Formed:
    """The group exists, and what had to be broadcast in it has been sent and received whole."""

    generation: int


@dataclass(frozen=True)
class Computed:
    """All slices of the step are computed: their results are at hand, and what is to be exchanged is too."""

    generation: int
    step: int


@dataclass(frozen=True)
class Reduced:
    """Every all-reduce of the step has succeeded on this worker."""

    generation: int
    step: int


@dataclass(frozen=True)
class Updated:
    """The variables are now those after `step`."""

    generation: int
    step: int


@dataclass(frozen=True)
class CollectiveFailed:
    """Forming the group, broadcasting or all-reducing in it has failed."""

    generation: int
    why: str


WorkerEvent: TypeAlias = Told | Formed | Computed | Reduced | Updated | CollectiveFailed


# --- worker: commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormGroup:
    """Form a process group with the others of this generation, broadcast if a `Broadcast` follows; then `Formed`."""

    generation: int
    rank: int
    size: int


@dataclass(frozen=True)
class Broadcast:
    """All variables after `step` from rank `source` to the ranks `behind`, which put them aside for `Adopt`."""

    generation: int
    source: int
    behind: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Adopt:
    """Make what was broadcast the variables; then `Updated`."""

    generation: int
    step: int


@dataclass(frozen=True)
class ComputeSlices:
    """Compute the gradients of these slices one after the other, each with its weight out of `total`; then `Computed`.

    No variable may change: what the forward pass changes is put aside, and becomes part of the update.
    """

    generation: int
    step: int
    slices: tuple[int, ...]
    weights: tuple[float, ...]
    total: float


@dataclass(frozen=True)
class AllReduce:
    """Add up what is exchanged over the group (the last of it, if some was begun before); then `Reduced`."""

    generation: int
    step: int


@dataclass(frozen=True)
class Update:
    """Update the variables with the sums; then `Updated`. Not to be broken off."""

    generation: int
    step: int


@dataclass(frozen=True)
class LeaveGroup:
    """Give up whatever is going on in this group, and the group. Never waits for the others in it."""

    generation: int


@dataclass(frozen=True)
class Say:
    """Send a message to the driver, with tensors beside it where its kind has some."""

    kind: str
    fields: Fields = field(default_factory=dict)


WorkerCommand: TypeAlias = FormGroup | Broadcast | Adopt | ComputeSlices | AllReduce | Update | LeaveGroup | Say | Story
