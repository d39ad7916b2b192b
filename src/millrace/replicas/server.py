"""The shell of a parameter server's shard: connections of workers, of the shard's copy, of the shard it is a copy of.

    server = ShardServer(ShardStore("shard 0", variables, update), Sync(4), workers)
    server.serve(handshake.listen("unix:/run/dir/shard-0"), token)        # until close(), from any thread

One thread serves a connection, and is the only one that writes to it. Who dials says who it is: {"worker": NAME}, or
{"shard": NAME} to a process that is to hold that shard's copy.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from millrace.errors import FetchError, MillraceError, WorkerError
from millrace.graph.signature import TensorSpec
from millrace.replicas.push_frame import Push, Told, decode, encode_told
from millrace.replicas.regions import TensorRegion, check_region, layout, to_json
from millrace.replicas.server_copy import CopyIn, CopyOut
from millrace.replicas.server_link import Link
from millrace.replicas.shard import Lying, Shard
from millrace.replicas.shard_events import Ack, Configured, CopyGained, Policy, Pushed
from millrace.replicas.shard_state import ShardState
from millrace.replicas.shard_store import ShardStore, Staged, check_rows
from millrace.runtime.handshake import Listener
from millrace.runtime.messages import Message

_LOOK_S = 0.2  # between two looks whether to end
_SETTLE_S = 60.0  # for a copy to say that it has everything, once it was sent


class ShardServer:
    """A shard, or the copy of one, that others can connect to.

    Args:
        store: the variables.
        policy, workers: how replicas agree at first, and which workers live.
        version: of the variables as they are; in sync mode the number of the next step.
        is_copy: follow the shard that connects, until `promote`.
        patience_s: how long a write to somebody may take.
    """

    def __init__(
        self,
        store: ShardStore,
        policy: Policy,
        workers: tuple[str, ...] = (),
        *,
        version: int = 0,
        is_copy: bool = False,
        patience_s: float = 10.0,
    ) -> None:
        self.shard = Shard(store, ShardState(policy, workers, version=version, is_copy=is_copy))
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self._copies: dict[str, Link] = {}  # of the links, that with the copy, by whose
        self._left: set[str] = set()  # copies that are known to be lost
        self._attaching = threading.Lock()
        self._copy_out: CopyOut | None = None
        self._copy_in: CopyIn | None = None
        self._closed = False

    # -- what the driver wants ------------------------------------------------------------------------------------

    def serve(self, listener: Listener, token: bytes) -> None:
        """Take connections until `close`; the listener is closed then."""
        with contextlib.closing(listener):
            while not self._closed:
                with contextlib.suppress(WorkerError):  # nobody came meanwhile
                    connection, hello = listener.accept(token, _LOOK_S)
                    threading.Thread(target=self.attend, args=(connection, hello), name="shard", daemon=True).start()

    def attend(self, connection: socket.socket, hello: Mapping[str, Any]) -> None:
        """Serve one connection until it ends. hello: what the other side said of itself."""
        shard = "shard" in hello
        link = Link(connection, hello["shard"] if shard else str(hello.get("worker", "somebody")))
        with self._lock:
            self._links.add(link)
        try:
            if self._closed:
                return
            if shard:
                self._copy_in = CopyIn(self.shard, link, self._patience_s)
                self._copy_in.run()
            else:
                _WorkerConnection(self.shard, link, self._patience_s).run()
        except MillraceError as error:
            with contextlib.suppress(MillraceError):
                link.send("error", self._patience_s, {"type": type(error).__name__, "text": str(error)})
        finally:
            link.close()
            with self._lock:
                self._links.discard(link)

    def configure(self, policy: Policy, workers: tuple[str, ...]) -> None:
        """How replicas agree from here on, and which workers live; a lost one is no longer waited for."""
        self.shard.tell(Configured(policy, workers))

    def attach_copy(
        self,
        connection: socket.socket,
        member: str = "",
        wait_s: float = _SETTLE_S,
        on_lost: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the process at the other end the holder of the copy. Returns when it has everything. One at a time.

        Args: connection: dialed with the hello {"shard": …}. member: names it, for `leave_copy`. on_lost: is told why
            it does not follow any more, before anything is acknowledged without it. on_progress: is called while it is
            sent everything.

        Raises: WorkerError when it does not say so in time.
        """
        with self._attaching:
            if self._copy_out is not None:
                self._copy_out.close()
            link = Link(connection, f"the process with the copy of {self.shard.store.who}")
            with self._lock:
                if member in self._left:
                    link.close()
                    raise WorkerError(f"{member} was lost before it could become a copy.")
                self._links.add(link)
                self._copies = {member: link}
            self._copy_out = copy = CopyOut(self.shard, link, self._patience_s, on_lost, on_progress)
            copy.start()
            copy.decided.wait(wait_s)
            if not copy.ready.is_set():
                copy.close()
                raise WorkerError(f"{link.who} did not say within {wait_s:.3g} s that it has everything.")

    def leave_copy(self, member: str) -> None:
        """Send no more to a copy that is known to be lost, also where that is under way."""
        with self._lock:
            self._left.add(member)
            link = self._copies.pop(member, None)
        if link is not None:
            link.end()

    def promote(self) -> None:
        """Become the shard whose copy this is. Raises: WorkerError when this is no copy, or no whole one."""
        if self._copy_in is None:
            raise WorkerError(f"{self.shard.store.who}: nothing was sent to this copy: restore the last checkpoint.")
        self._copy_in.promote()

    def read(self) -> dict[str, Tensor]:
        """Copies of all variables, of one version."""
        with self.shard.still():
            return {name: tensor.clone() for name, tensor in self.shard.store.region.tensors.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give variables new values, while no worker reads or pushes. Returns when the copy has them, too.

        Raises: FetchError for one that is not here.
        """
        with self.shard.still():
            for name, value in values.items():
                self.shard.store.tensor(name).copy_(value)
            copy = self._copy_out if self.shard.state.has_copy else None
            if copy is not None:
                self.shard.tell(CopyGained())
        if copy is not None and not self.shard.settle(_SETTLE_S):
            copy.close()  # one that does not say so holds no copy

    def report(self) -> dict[str, Any]:
        """Version, how many pushes were dropped, whether there is a copy that has everything."""
        with self.shard.still():
            state = self.shard.state
            ready = self._copy_out is not None and self._copy_out.ready.is_set()
            return {"version": state.version, "dropped": state.dropped, "copied": state.has_copy and ready}

    def close(self) -> None:
        """End all connections. The variables' memory goes with the last process that has it mapped."""
        self._closed = True
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end()


class _WorkerConnection:
    """What one worker asks, one question after the other."""

    def __init__(self, shard: Shard, link: Link, patience_s: float) -> None:
        self._shard = shard
        self._store = shard.store
        self._link = link
        self._patience_s = patience_s
        self._mailboxes: dict[int, TensorRegion] = {}
        self._places, _ = layout(self._store.gradients)
        self._tables = {table: TensorSpec.of(self._store.tensor(table)) for table in self._store.tables}
        self._snapshot: dict[str, Tensor] = {}

    def run(self) -> None:
        """Answer until the worker ends."""
        self._welcome()
        ask = {"fetch": self._fetch, "mailbox": self._mailbox}
        while True:
            message = self._link.receive_any()
            if isinstance(message, Message) and message.kind not in ask:
                raise WorkerError(f"{self._link.who} said {message.kind!r}, which no worker says to a shard.")
            try:
                if isinstance(message, Message):
                    ask[message.kind](message)
                else:
                    self._push(decode(message, self._tables))
            except MillraceError as error:
                self._say("error", {"type": type(error).__name__, "text": str(error)})

    def _say(self, kind: str, fields: dict[str, Any], **tensors: Tensor) -> None:
        self._link.send(kind, self._patience_s, fields, **tensors)

    def _welcome(self) -> None:
        store = self._store
        fields = {
            "shard": store.who,
            "version": self._shard.state.version,
            "variables": to_json(store.fetched_places),
            "gradients": to_json(self._places),
            "tables": to_json([place for name in store.tables for place in store.region.places if place.name == name]),
        }
        self._say("welcome", fields)
        if self._link.shared:
            self._link.send_region(store.region.descriptor, self._patience_s)

    def _mailbox(self, message: Message) -> None:
        descriptor = self._link.receive_region(self._patience_s)
        check_region(descriptor, self._places, self._link.who)
        # What the memory held before may still be waiting for its turn: the tensors keep it.
        self._mailboxes[message.fields["number"]] = TensorRegion(descriptor, self._places)

    def _fetch(self, message: Message) -> None:
        fields = message.fields
        for table, rows in message.tensors.items():
            if table not in self._tables:
                raise FetchError(f"{self._store.who} has no table {table!r}.")
            check_rows(table, self._tables[table], rows)
        with self._shard.readable(self._link.who, fields["step"], fields["timeout_s"]) as version:
            found = [self._copied(name) for name in fields["inline"] or ()]
            found += [self._store.tensor(table)[rows] for table, rows in message.tensors.items()]
        self._say("fetched", {"version": version})
        with self._link.in_bulk():
            self._link.send_tensors(found, fields["timeout_s"])

    def _copied(self, name: str) -> Tensor:
        """A copy of a variable, in memory that is used again."""
        live = self._store.tensor(name)
        if name not in self._snapshot:
            self._snapshot[name] = live.clone()
        return self._snapshot[name].copy_(live)

    def _push(self, push: Push) -> None:
        region, gradients = None, {}
        if push.dense:
            with self._link.in_bulk() if not self._link.shared else contextlib.nullcontext():
                region = self._region(push.slice)
                gradients = region.tensors
                if not self._link.shared:
                    self._link.receive_tensors(gradients.values(), push.timeout_s)
        for table, given in push.rows.items():
            check_rows(table, self._tables[table], given.rows)
        who = self._link.who
        key = f"{who}/{push.sequence}"
        event = Pushed(who, push.sequence, push.step, push.version, push.slice, push.examples, key)
        answer = self._shard.push(event, Lying(Staged(gradients, push.rows), region), push.timeout_s)
        if isinstance(answer, Ack):
            self._link.send_frame(encode_told(Told(answer.sequence, answer.version, answer.tau)), self._patience_s)
        else:
            self._say("dropped", {"why": answer.why, "version": answer.version})

    def _region(self, slice: int) -> TensorRegion:
        if slice not in self._mailboxes:
            if self._link.shared:
                raise WorkerError(f"{self._link.who} pushed slice {slice} without having shared memory for it.")
            self._mailboxes[slice] = TensorRegion.new(self._store.who, self._store.gradients)
        return self._mailboxes[slice]
