"""What a parameter server's shard is told (events), and what it then wants done (commands)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sync:
    """An update is made of the pushes of the first `needed` distinct slices of a step; later ones are dropped."""

    needed: int


@dataclass(frozen=True)
class Async:
    """Every push is an update.

    bound: a worker that has made that many more updates than the slowest one waits with its next fetch (stale
        synchronous parallel, Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel
        Parameter Server"); None for no bound.
    damped: weigh a push by 1 / (1 + staleness) (after Zhang et al. 2016, "Staleness-aware Async-SGD", equation 3,
        which divides the rate by the staleness).
    """

    bound: int | None = None
    damped: bool = False


Policy = Sync | Async


@dataclass(frozen=True)
class Pushed:
    """A push lies here whole.

    worker: of one process, never used again. sequence: greater in every new push of that worker. step: of the run, for
    sync. version: of the variables that the gradients were computed with. slice: of the batch. examples: in it.
    key: names what was staged.
    """

    worker: str
    sequence: int
    step: int
    version: int
    slice: int = 0
    examples: int = 1
    key: str = ""


@dataclass(frozen=True)
class Configured:
    """The driver says how replicas agree from here on, and which workers live."""

    policy: Policy
    workers: tuple[str, ...]


Entry = Pushed | Configured  # of the log


@dataclass(frozen=True)
class FetchWanted:
    """A worker wants the variables for a step (its number counts in sync mode only)."""

    worker: str
    step: int


@dataclass(frozen=True)
class FetchGivenUp:
    """A worker does not wait any longer."""

    worker: str


@dataclass(frozen=True)
class CopyGained:
    """A process is there that is to hold the copy."""


@dataclass(frozen=True)
class CopyAcked:
    """The copy has entered the log up to there."""

    index: int


@dataclass(frozen=True)
class CopyLost:
    """The copy has ended."""


@dataclass(frozen=True)
class Forwarded:
    """To a copy: the next entry of the log; the data of a push are staged here under its key."""

    index: int
    entry: Entry


@dataclass(frozen=True)
class BecomeShard:
    """To a copy: the shard is lost, take its place."""


@dataclass(frozen=True)
class Ack:
    """Tell a worker that its push counts. tau: the number of updates between its fetch and its turn."""

    worker: str
    sequence: int
    version: int
    tau: int


@dataclass(frozen=True)
class Drop:
    """Tell a worker that its push does not count. version: of the variables."""

    worker: str
    sequence: int
    why: str
    version: int = 0


@dataclass(frozen=True)
class Reply:
    """Let a worker read the variables, which are of this version."""

    worker: str
    version: int


@dataclass(frozen=True)
class Hold:
    """Nothing to do for a worker's fetch yet."""

    worker: str
    why: str


@dataclass(frozen=True)
class Apply:
    """Update the variables with the weighted sum of what is staged under these keys. version: theirs afterwards."""

    keys: tuple[str, ...]
    weights: tuple[float, ...]
    version: int


@dataclass(frozen=True)
class Forward:
    """Send an entry, and what is staged under its key, to the copy."""

    index: int
    entry: Entry


@dataclass(frozen=True)
class AckCopy:
    """Tell the shard that this copy has its log up to there."""

    index: int


@dataclass(frozen=True)
class Known:
    """The last push of a worker that counted: where it stands in the log, and what is said of it."""

    index: int
    ack: Ack


@dataclass(frozen=True)
class Snapshot:
    """All that the log has decided so far."""

    policy: Policy
    workers: tuple[str, ...]
    version: int = 0
    index: int = 0
    version_index: int = 0  # of the entry that made the version
    known: Mapping[str, Known] = field(default_factory=dict)  # worker -> its last push
    clocks: Mapping[str, int] = field(default_factory=dict)  # living worker -> number of its updates
    staged: Mapping[int, Pushed] = field(default_factory=dict)  # slice -> its push for the step that is being gathered


@dataclass(frozen=True)
class SendState:
    """Send the copy this, all variables as they are now, and what is staged."""

    snapshot: Snapshot


@dataclass(frozen=True)
class Restored:
    """To a copy: what a shard sent with `SendState` is in place."""

    snapshot: Snapshot


Event = (
    Pushed
    | Configured
    | FetchWanted
    | FetchGivenUp
    | CopyGained
    | CopyAcked
    | CopyLost
    | Forwarded
    | Restored
    | BecomeShard
)
Command = Ack | Drop | Reply | Hold | Apply | Forward | SendState | AckCopy
