"""A worker's side of parameter servers: `ShardClient` talks with one shard, `ShardClients` with all of them at once.

On the shard's host the variables are read where they lie, in memory that the shard shares, and gradients are written
into memory that the worker shares; only a line about them travels. From another host the same tensors travel as bytes.

A push is acknowledged or it is not. When the connection ends before, `move_to` the shard's new address asks again for
whatever was open; a shard that has the push already says so and does not apply it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from millrace import errors
from millrace.errors import FeedError, FetchError, WorkerError, did_you_mean
from millrace.graph.signature import TensorSpec
from millrace.replicas.push_frame import Push, decode_told, encode
from millrace.replicas.regions import TensorRegion, check_region, from_json
from millrace.replicas.server_link import Link
from millrace.replicas.shard_state import NO_LIMIT
from millrace.replicas.shard_store import Rows, check_rows, check_values
from millrace.runtime.handshake import dial
from millrace.runtime.messages import Message

_GRACE_S = 2.0  # the shard notices first that time is up, and can say what it waited for
_TRIES = 3  # to read variables in place while others push


@dataclass(frozen=True)
class Receipt:
    """What a shard said of a push.

    version: of its variables afterwards. tau: updates between its fetch and its turn. why: it was dropped, if it was.
    """

    applied: bool
    version: int
    tau: int | None
    why: str = ""


@dataclass
class _Open:
    """A question without an answer yet. into, rows: where a fetch goes. dense: the gradients of a push."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    into: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    frame: bytes = b""  # instead of fields
    found: Any = None  # the answer, where nobody had to be asked


class ShardClient:
    """One worker's connection with one shard; for one thread.

    Args:
        address: of the shard.
        worker: names this process; never used by another one, also not by its replacement.
        timeout_s: seconds that the shard may take for an answer.
        token: of the run.

    Attributes: variables, gradients, tables: what the shard holds and takes, by name.

    Raises: WorkerError when it is not there.
    """

    def __init__(self, address: str, worker: str, token: bytes, *, timeout_s: float = 60.0) -> None:
        self.worker = worker
        self.timeout_s = timeout_s
        self._token = token
        self._boxes: dict[int, TensorRegion] = {}  # slice -> memory for its gradients
        self._open: _Open | None = None
        self._link: Link | None = None
        self._connect(address)

    # -- one thing at a time --------------------------------------------------------------------------------------

    def fetch(self, into: Mapping[str, Tensor], step: int = 0, rows: Mapping[str, Rows] | None = None) -> int:
        """Copy variables, and some rows of tables, into the worker's own tensors, all of one version.

        Args:
            step: in sync mode, for which step; the shard answers when the one before is complete.
            rows: of tables by name: which, and `values`, contiguous, to be filled with them.

        Returns: their version.
        Raises: WorkerError when the shard has ended or lets one wait too long, and for whom it waited; FetchError;
            FeedError for rows that a table does not have.
        """
        self.start_fetch(into, step, rows)
        return self.finish_fetch()

    def push(
        self,
        gradients: Mapping[str, Tensor],
        sequence: int,
        step: int,
        version: int,
        *,
        slice: int = 0,
        examples: int = 1,
        rows: Mapping[str, Rows] | None = None,
    ) -> Receipt:
        """Give the shard gradients.

        Args:
            gradients: every one that the shard takes, or none. Those of `mailbox` are not copied.
            sequence: greater than that of this worker's last push.
            step: of the run.
            version: that `fetch` returned before they were computed.
            slice: of the batch, which the shard counts once for each step in sync mode.
            examples: in it: its weight.
            rows: gradients for rows of tables.

        Raises: WorkerError as `fetch`; FeedError for other shapes than the shard's.
        """
        self.start_push(gradients, sequence, step, version, slice=slice, examples=examples, rows=rows)
        return self.finish_push()

    def mailbox(self, slice: int = 0) -> Mapping[str, Tensor]:
        """The memory that gradients of a slice are given in: what is computed into it need not be copied by `push`.

        It may be written until it is pushed, and again when that push was applied (in sync mode: after the next fetch).
        """
        if slice not in self._boxes:
            self._boxes[slice] = TensorRegion.new(self.worker, self.gradients)
            self._share(slice)
        return self._boxes[slice].tensors

    # -- in two halves, so that several shards work at once -------------------------------------------------------

    def start_fetch(self, into: Mapping[str, Tensor], step: int = 0, rows: Mapping[str, Rows] | None = None) -> None:
        """Ask for variables and rows; `finish_fetch` waits for them."""
        for name in into:
            if name not in self.variables:
                known = list(self.variables)
                raise FetchError(f"{self.shard} has no variable {name!r} to fetch. {did_you_mean(name, known)}")
        for table, wanted in (rows or {}).items():
            check_rows(table, self._table(table), wanted.rows)
            check_values(table, self._table(table), wanted)
        question = _Open("fetch", {"step": step, "inline": None}, into, rows or {})
        question.found = self._without_asking(step, lambda: self._copy(question))
        self._ask(question)

    def finish_fetch(self) -> int:
        """Returns: the version of what was copied. Raises: as `fetch`."""
        asked = self._waiting("fetch")
        tries = 0
        while asked.found is None:
            version: int = self._said().fields["version"]
            if asked.fields["inline"] is not None:
                self._receive([*asked.into.values(), *(wanted.values for wanted in asked.rows.values())])
                asked.found = version
                break
            asked.found = self._of_version(version, lambda: self._copy(asked))
            if asked.found is not None:
                break
            tries += 1
            if tries == _TRIES:  # others push all the time: let the shard copy the variables while nobody does
                asked.fields["inline"] = list(asked.into)
            self._ask(asked)
        self._open = None
        found: int = asked.found
        return found

    def start_push(
        self,
        gradients: Mapping[str, Tensor],
        sequence: int,
        step: int,
        version: int,
        *,
        slice: int = 0,
        examples: int = 1,
        rows: Mapping[str, Rows] | None = None,
    ) -> None:
        """Hand gradients over; `finish_push` waits for what the shard says of them."""
        self._check(gradients)
        given = rows or {}
        for table, part in given.items():
            check_values(table, self._table(table), part)
        if gradients:
            box = self.mailbox(slice)
            for name, gradient in gradients.items():
                if gradient.data_ptr() != box[name].data_ptr():
                    box[name].copy_(gradient)
            gradients = box
        push = Push(sequence, step, version, slice, examples, self.timeout_s, bool(gradients), given)
        self._ask(_Open("push", dense=gradients, frame=encode(push, list(self.tables))))

    def finish_push(self) -> Receipt:
        """Returns: what became of it. Raises: as `push`."""
        self._waiting("push")
        said = self._answer()
        self._open = None
        if isinstance(said, Message):
            return Receipt(False, said.fields["version"], None, said.fields["why"])
        told = decode_told(said)
        return Receipt(True, told.version, told.tau)

    @property
    def connected(self) -> bool:
        """Whether there is a connection. After an error without one the shard has ended, or is stuck."""
        return self._link is not None

    # -- where the shard is ---------------------------------------------------------------------------------------

    def move_to(self, address: str) -> None:
        """Use the shard at a new address, and ask it again what the old one left open.

        Then call what had failed: `finish_fetch` or `finish_push`. Raises: WorkerError.
        """
        self.close()
        self._connect(address)
        for slice in self._boxes:
            self._share(slice)
        if self._open is not None:
            self._ask(self._open)

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _live(self) -> Link:
        if self._link is None:
            raise WorkerError(f"{self.worker} has no connection with {self.shard}: it failed before, or was closed.")
        return self._link

    def _connect(self, address: str) -> None:
        hello = {"worker": self.worker}
        link = Link(dial(address, self._token, hello, self.timeout_s), f"the shard at {address}")
        said = link.receive(self.timeout_s)
        if said.kind != "welcome":
            link.close()
            raise WorkerError(f"{link.who} did not welcome {self.worker}: {said.fields.get('text', said.kind)}")
        self._link = link
        link.who = self.shard = said.fields["shard"]
        places = from_json(said.fields["variables"])
        self.variables: dict[str, TensorSpec] = {place.name: place.spec for place in places}
        self.gradients = {place.name: place.spec for place in from_json(said.fields["gradients"])}
        self.tables = {place.name: place.spec for place in from_json(said.fields["tables"])}
        self._shown: TensorRegion | None = None
        if link.shared:
            descriptor = link.receive_region(self.timeout_s)
            places += from_json(said.fields["tables"])
            check_region(descriptor, places, link.who)
            self._shown = TensorRegion(descriptor, places)

    def _share(self, slice: int) -> None:
        """Give the shard a mailbox. Where there is none just now, `move_to` does it."""
        if self._link is None or not self._link.shared:
            return
        try:
            self._link.send("mailbox", self.timeout_s, {"number": slice})
            self._link.send_region(self._boxes[slice].descriptor, self.timeout_s)
        except WorkerError:
            self.close()

    def _ask(self, question: _Open) -> None:
        if self._open is not None and self._open is not question:
            raise WorkerError(f"{self.worker} has not finished its {self._open.kind} with {self.shard} yet.")
        self._open = question
        if question.found is not None:
            return
        try:
            if question.kind == "fetch" and not self._live.shared:
                question.fields["inline"] = list(question.into)
            if question.frame:
                self._live.send_frame(question.frame, self.timeout_s)
            else:
                fields = {**question.fields, "timeout_s": self.timeout_s}
                inline = fields["inline"] is not None
                named = {table: wanted.rows for table, wanted in question.rows.items() if inline}
                self._live.send(question.kind, self.timeout_s, fields, **named)
            if question.dense and not self._live.shared:
                self._live.send_tensors(question.dense.values(), self.timeout_s)
        except WorkerError as error:
            raise self._lost() from error

    def _lost(self) -> WorkerError:
        """The connection is of no use any more."""
        self.close()
        assert self._open is not None
        return WorkerError(
            f"{self.shard} ended, or said nothing for {self.timeout_s:.3g} s, while {self.worker} waited for its "
            f"{self._open.kind}. Where it has a copy, move to that one's address; else restore the last checkpoint."
        )

    def _waiting(self, kind: str) -> _Open:
        if self._open is None or self._open.kind != kind:
            raise WorkerError(f"{self.worker} waits for no {kind} from {self.shard}: start one first.")
        return self._open

    def _said(self) -> Message:
        """An answer that is a message."""
        said = self._answer()
        if not isinstance(said, Message):
            raise WorkerError(f"{self.shard} acknowledged a push where {self.worker} waited for something else.")
        return said

    def _answer(self) -> Message | bytearray:
        """What the shard says. After silence the connection is of no use: a late answer would be taken for another."""
        try:
            message = self._live.receive_any(self.timeout_s + _GRACE_S)
        except WorkerError as error:
            raise self._lost() from error
        if isinstance(message, Message) and message.kind == "error":
            self._open = None
            raise getattr(errors, message.fields["type"], WorkerError)(message.fields["text"])
        return message

    def _receive(self, tensors: Iterable[Tensor]) -> None:
        try:
            self._live.receive_tensors(tensors, self.timeout_s)
        except WorkerError as error:
            raise self._lost() from error

    def _without_asking(self, step: int, read: Callable[[], None]) -> int | None:
        """Read what is shared, where the shard lets everybody. Returns: the version; None if it has to be asked."""
        if self._shown is None or self._link is None:
            return None
        version, limit = self._shown.word // 2, self._shown.limit
        if version > limit or (limit != NO_LIMIT and version < step):
            return None
        return self._of_version(version, read)

    def _of_version(self, version: int, read: Callable[[], None]) -> int | None:
        """Read what is shared. Returns: the version; None when it was, or became, another one."""
        assert self._shown is not None
        if self._shown.word != 2 * version:
            return None
        read()
        return version if self._shown.word == 2 * version else None

    def _copy(self, asked: _Open) -> None:
        assert self._shown is not None
        for name, target in asked.into.items():
            target.copy_(self._shown.tensors[name])
        for table, wanted in asked.rows.items():
            torch.index_select(self._shown.tensors[table], 0, wanted.rows, out=wanted.values)

    def _table(self, name: str) -> TensorSpec:
        if name not in self.tables:
            raise FetchError(f"{self.shard} has no table {name!r}. {did_you_mean(name, list(self.tables))}")
        return self.tables[name]

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        if gradients and gradients.keys() != self.gradients.keys():
            raise FeedError(f"{self.shard} takes gradients of {list(self.gradients)}, got {list(gradients)}.")
        for name, gradient in gradients.items():
            if not self.gradients[name].fits(gradient):
                got = f"{gradient.dtype} {list(gradient.shape)}"
                raise FeedError(f"gradient {name!r} for {self.shard}: {self.gradients[name]} expected, got {got}.")
