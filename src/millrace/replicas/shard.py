"""A shard at work: the state machine and the variables behind one lock, and whoever waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from millrace.errors import MillraceError, WorkerError
from millrace.replicas.regions import TensorRegion
from millrace.replicas.shard_events import (
    Ack,
    AckCopy,
    Apply,
    Command,
    Configured,
    Drop,
    Event,
    FetchGivenUp,
    FetchWanted,
    Forward,
    Hold,
    Pushed,
    Reply,
    SendState,
)
from millrace.replicas.shard_state import ShardState
from millrace.replicas.shard_store import ShardStore, Staged

ToPeer = Callable[[Forward | SendState | AckCopy], None]


@dataclass(frozen=True)
class Lying:
    """What is staged, and in which region its gradients lie (None: it has only rows)."""

    staged: Staged
    region: TensorRegion | None


class Shard:
    """Tells the state machine what happened and does what it says, one event at a time.

    Updating happens under the lock, so that events see whole versions; workers that read the shared variables
    themselves look at the version word instead.

    to_peer: takes what is for the copy, or, on a copy, what is for the shard. It must not fail.
    """

    def __init__(self, store: ShardStore, state: ShardState) -> None:
        self.store = store
        self.state = state
        self.to_peer: ToPeer | None = None
        self._changed = threading.Condition()
        self._staged: dict[str, Lying] = {}
        self._acks: dict[str, Ack | Drop] = {}  # worker -> what it is to be told of its last push
        self._replies: dict[str, Reply] = {}
        self._failure: MillraceError | None = None
        store.region.word = 2 * state.version
        store.region.limit = state.limit()

    def tell(self, event: Event) -> None:
        """Handle an event. Raises: what an update raised, from then on for every event."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            try:
                for command in self.state.handle(event):
                    self._do(command)
                self.store.region.limit = self.state.limit()
            except MillraceError as error:
                self._failure = error
                raise
            finally:
                self._changed.notify_all()

    def stage(self, key: str, lying: Lying) -> None:
        """Keep a push until it is applied."""
        with self._changed:
            self._staged[key] = lying

    def staged(self, key: str) -> Lying:
        """What lies under a key."""
        return self._staged[key]

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Nothing changes inside."""
        with self._changed:
            yield

    def push(self, event: Pushed, lying: Lying, timeout_s: float) -> Ack | Drop:
        """Stage a push and wait until its worker may be told of it.

        Raises: WorkerError when the copy does not have it in time.
        """
        with self._changed:
            self._acks.pop(event.worker, None)
            self._staged[event.key] = lying
            self.tell(event)
            if event.key not in {push.key for push in self.state.staged.values()}:
                self._staged.pop(event.key, None)
            deadline_s = time.monotonic() + timeout_s
            while event.worker not in self._acks:
                if not self._wait(deadline_s):
                    raise WorkerError(
                        f"{self.store.who} has push {event.sequence} of {event.worker}, but its copy did not say "
                        f"within {timeout_s:.3g} s that it has it too. See whether the process with the copy is stuck."
                    )
            return self._acks.pop(event.worker)

    def settle(self, timeout_s: float) -> bool:
        """Wait until the copy, if there is one, has all that is here now. Returns: whether that came to be in time."""
        with self._changed:
            self.tell(Configured(self.state.policy, self.state.workers))  # it changes nothing, and comes last
            index, deadline_s = self.state.index, time.monotonic() + timeout_s
            while self.state.settled < index:
                if not self._wait(deadline_s):
                    return False
            return True

    @contextlib.contextmanager
    def readable(self, worker: str, step: int, timeout_s: float) -> Iterator[int]:
        """Wait until a worker may read the variables for a step; inside they stay as they are.

        Yields: their version.
        Raises: WorkerError when the time is up, naming whom was waited for.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._replies.pop(worker, None)
                self.tell(FetchWanted(worker, step))
                while worker not in self._replies:
                    if not self._wait(deadline_s):
                        why = self.state.why_held(worker)
                        self.tell(FetchGivenUp(worker))
                        raise WorkerError(
                            f"{self.store.who} let {worker} wait {timeout_s:.3g} s for the variables of step {step}. "
                            f"It waited for {why}."
                        )
                # Between the reply and this thread's turn there may have been another update.
                if self._replies.pop(worker).version == self.state.version:
                    break
            yield self.state.version

    def _wait(self, deadline_s: float) -> bool:
        """Until something changes; False when the time is up."""
        left_s = deadline_s - time.monotonic()
        if self._failure is not None:
            raise self._failure
        return left_s > 0 and self._changed.wait(left_s)

    def _do(self, command: Command) -> None:
        match command:
            case Apply(keys, weights, version):
                lying = [self._staged.pop(key) for key in keys]
                self.store.apply([each.staged for each in lying], weights, version)
            case Ack(worker) | Drop(worker):
                self._acks[worker] = command
            case Reply(worker):
                self._replies[worker] = command
            case Forward() | SendState() | AckCopy():
                assert self.to_peer is not None
                self.to_peer(command)
            case Hold():
                pass
