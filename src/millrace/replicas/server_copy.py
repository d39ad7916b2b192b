"""The connection between a shard and the process that holds its copy: both ends.

What is pushed to the shard in memory that its worker shares is not copied on the way: the copy is given the same memory
and reads it there, before the worker is told that it is free again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.errors import MillraceError, WorkerError
from millrace.replicas.regions import TensorRegion, check_region, layout, to_json
from millrace.replicas.server_link import Link
from millrace.replicas.shard import Lying, Shard
from millrace.replicas.shard_events import (
    AckCopy,
    BecomeShard,
    CopyAcked,
    CopyGained,
    CopyLost,
    Forward,
    Forwarded,
    Pushed,
    Restored,
    SendState,
)
from millrace.replicas.shard_log import entry_from_json, entry_to_json, snapshot_from_json, snapshot_to_json
from millrace.replicas.shard_store import Rows, Staged
from millrace.runtime.messages import Message

_PIECE_BYTES = 64 * 2**20  # of a shard are sent to its copy at a time


def rows_to_tensors(rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Rows of tables as the tensors of a message."""
    return {f"{part}:{table}": getattr(given, part) for table, given in rows.items() for part in ("rows", "values")}


def rows_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Rows]:
    """The reverse of `rows_to_tensors`."""
    tables = [name.removeprefix("rows:") for name in tensors if name.startswith("rows:")]
    return {table: Rows(tensors[f"rows:{table}"], tensors[f"values:{table}"]) for table in tables}


class CopyOut:
    """At the shard. Sends what the copy is to have, and hears what it has.

    patience_s: how long the copy may take nothing before it counts as lost. on_lost: is told why the copy is lost,
    before anything is acknowledged without it. on_progress: is called whenever a piece of all it is to have was sent.
    """

    def __init__(
        self,
        shard: Shard,
        link: Link,
        patience_s: float,
        on_lost: Callable[[str], None],
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._shard = shard
        self._link = link
        self._patience_s = patience_s
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._given: dict[int, weakref.ref[TensorRegion]] = {}  # regions that the copy has too, by number
        self._numbers = itertools.count()
        self._acked = -1  # how much of the log it says it has
        self.ready = threading.Event()  # the copy has everything
        self.decided = threading.Event()  # it is ready, or was lost before
        self._thread = threading.Thread(target=self._listen, name="copy", daemon=True)

    def start(self) -> None:
        """Make the other side the copy; returns when it has been sent everything."""
        with self._shard.still():
            self._shard.to_peer = self._send
            self._shard.tell(CopyGained())
        self._thread.start()

    def close(self) -> None:
        """End the connection."""
        self._link.end()
        if self._thread.ident is not None:
            self._thread.join(self._patience_s)

    def _listen(self) -> None:
        try:
            while True:
                message = self._receive()
                if message.kind == "error":
                    raise WorkerError(message.fields["text"])
                self._acked = message.fields["index"]
                self._shard.tell(CopyAcked(self._acked))
                self.ready.set()
                self.decided.set()
        except MillraceError as error:
            self.ready.clear()
            self.decided.set()
            self._link.close()
            with self._shard.still(), contextlib.suppress(MillraceError):
                if self._shard.to_peer == self._send:
                    self._on_lost(str(error))
                    self._shard.tell(CopyLost())

    def _receive(self) -> Message:
        """What the copy says next. Raises: WorkerError when it has ended, or does not take what was sent long ago."""
        sent = self._shard.state.index
        while not self._link.readable(self._patience_s):
            if self._acked < sent:
                raise WorkerError(
                    f"{self._link.who} did not say within {self._patience_s:.3g} s that it has entry {sent}: it is "
                    "stuck. Another process is to hold the copy."
                )
            sent = self._shard.state.index
        return self._link.receive()

    def _send(self, command: Forward | SendState | AckCopy) -> None:
        try:
            if isinstance(command, Forward):
                fields = {"index": command.index, "entry": entry_to_json(command.entry)}
                key = command.entry.key if isinstance(command.entry, Pushed) else None
                self._send_with_data("forward", key, fields)
            elif isinstance(command, SendState):
                for push in command.snapshot.staged.values():
                    self._send_with_data("staged", push.key, {"key": push.key})
                region = self._shard.store.region
                fields = {"snapshot": snapshot_to_json(command.snapshot), "places": to_json(region.places)}
                self._link.send("state", self._patience_s, fields)
                content = torch.frombuffer(region.content(), dtype=torch.uint8)
                for piece in content.split(_PIECE_BYTES):
                    self._link.send_tensors([piece], self._patience_s)
                    self._on_progress()
        except WorkerError:
            self._link.end()  # `_listen` sees it and says so

    def _send_with_data(self, kind: str, key: str | None, fields: dict[str, Any]) -> None:
        if key is None:
            self._link.send(kind, self._patience_s, fields)
            return
        lying = self._shard.staged(key)
        tensors = rows_to_tensors(lying.staged.rows)
        number = None
        if lying.region is not None and self._link.shared:
            number = self._number(lying.region)
        dense = bool(lying.staged.gradients)
        self._link.send(kind, self._patience_s, {**fields, "dense": dense, "mailbox": number}, **tensors)
        if dense and not self._link.shared:
            self._link.send_tensors(lying.staged.gradients.values(), self._patience_s)

    def _number(self, region: TensorRegion) -> int:
        """The number by which the copy knows a region; it is given those that it does not know."""
        for number, known in list(self._given.items()):
            if known() is region:
                return number
            if known() is None:  # its worker has gone, and nothing that it pushed is still to be applied
                del self._given[number]
                self._link.send("mailbox_gone", self._patience_s, {"number": number})
        number = next(self._numbers)
        self._link.send("mailbox", self._patience_s, {"number": number})
        self._link.send_region(region.descriptor, self._patience_s)
        self._given[number] = weakref.ref(region)
        return number


class CopyIn:
    """At the copy. Takes what the shard sends, until the connection ends or the copy becomes the shard."""

    def __init__(self, shard: Shard, link: Link, timeout_s: float) -> None:
        self._shard = shard
        self._link = link
        self._timeout_s = timeout_s
        self._mailboxes: dict[int, TensorRegion] = {}
        self._ended = threading.Event()
        self._complete = False
        shard.to_peer = self._send

    def run(self) -> None:
        """Follow the shard. Returns when it has ended."""
        try:
            while True:
                self._take(self._link.receive())
        except WorkerError:
            pass  # the shard has ended: the driver says what is next
        except MillraceError as error:
            with contextlib.suppress(WorkerError):
                self._link.send("error", self._timeout_s, {"text": str(error)})
            raise
        finally:
            self._link.close()
            self._ended.set()

    def promote(self) -> None:
        """Become the shard. What the lost one had sent whole is taken first.

        Raises: WorkerError when it had not yet sent everything.
        """
        self._link.end_reading()
        if not self._ended.wait(self._timeout_s):
            raise WorkerError(f"{self._shard.store.who}: its copy still works on what the lost shard had sent it.")
        if not self._complete:
            raise WorkerError(
                f"{self._shard.store.who} was lost before its copy had everything: restore it from the last checkpoint."
            )
        self._shard.to_peer = None
        self._shard.tell(BecomeShard())

    def _take(self, message: Message) -> None:
        fields = message.fields
        match message.kind:
            case "mailbox":
                descriptor = self._link.receive_region(self._timeout_s)
                places, _ = layout(self._shard.store.gradients)
                check_region(descriptor, places, self._link.who)
                self._mailboxes[fields["number"]] = TensorRegion(descriptor, places)
            case "mailbox_gone":
                del self._mailboxes[fields["number"]]
            case "staged":
                self._shard.stage(fields["key"], self._lying(message))
            case "forward":
                entry = entry_from_json(fields["entry"])
                if isinstance(entry, Pushed):
                    self._shard.stage(entry.key, self._lying(message))
                self._shard.tell(Forwarded(fields["index"], entry))
            case "state":
                self._restore(message)
            case _:
                raise WorkerError(f"{self._link.who} said {message.kind!r}, which no shard says to its copy.")

    def _restore(self, message: Message) -> None:
        store = self._shard.store
        if json.loads(json.dumps(to_json(store.region.places))) != message.fields["places"]:
            raise WorkerError(f"{store.who}: its copy was made with other variables. Give both the same ones.")
        snapshot = snapshot_from_json(message.fields["snapshot"])
        self._link.receive_tensors([torch.frombuffer(store.region.content(), dtype=torch.uint8)], self._timeout_s)
        store.region.word = 2 * snapshot.version
        self._complete = True
        self._shard.tell(Restored(snapshot))

    def _lying(self, message: Message) -> Lying:
        rows = rows_from_tensors(message.tensors)
        if not message.fields["dense"]:
            return Lying(Staged(rows=rows), None)
        number = message.fields["mailbox"]
        if number is not None:
            region = self._mailboxes[number]
            return Lying(Staged(region.tensors, rows), region)
        gradients = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in self._shard.store.gradients.items()}
        self._link.receive_tensors(gradients.values(), self._timeout_s)
        return Lying(Staged(gradients, rows), None)

    def _send(self, command: Forward | SendState | AckCopy) -> None:
        assert isinstance(command, AckCopy)
        with contextlib.suppress(WorkerError):  # the shard has ended; what it sent before still counts
            self._link.send("copied", self._timeout_s, {"index": command.index})
