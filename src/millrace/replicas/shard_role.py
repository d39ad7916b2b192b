"""The role of a member that holds a shard of the variables, or the copy of one."""

from __future__ import annotations

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.errors import MillraceError, WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.graph.signature import TensorSpec
from millrace.replicas.line import Line, or_end
from millrace.replicas.programs import as_bytes
from millrace.replicas.regions import from_json
from millrace.replicas.server import ShardServer
from millrace.replicas.shard_events import Sync
from millrace.replicas.shard_log import policy_from_json
from millrace.replicas.shard_store import ShardStore
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.handshake import dial, listen
from millrace.runtime.messages import LONGEST_WAIT_S, Message

_DIAL_S = 10.0


def shard(line: Line, role: Message) -> None:
    """Hold a shard until the driver ends."""
    held = _ShardRole(line, role)
    if isinstance(role.tensors, dict):
        role.tensors.clear()  # they have been copied, and whoever called keeps the message
    held.run()


def _zeros(spec: TensorSpec) -> Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=spec.dtype).expand(spec.shape)


class _ShardRole:
    def __init__(self, line: Line, role: Message) -> None:
        fields = role.fields
        self._line = line
        self._told: queue.SimpleQueue[Message] = queue.SimpleQueue()
        number, is_copy = fields["shard"], fields["copy"]
        who = f"{'the copy of ' if is_copy else ''}shard {number} ({line.name})"
        given = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items() if n.startswith(VARIABLE)}
        variables = {
            place.name: given[place.name] if place.name in given else _zeros(place.spec)
            for place in from_json(fields["variables"])
        }
        store = ShardStore(who, variables, graph_from_bytes(as_bytes(role.tensors[GRAPH])))
        policy = policy_from_json(fields["policy"])
        self._server = ShardServer(store, policy, is_copy=is_copy, patience_s=fields["timeout_s"])
        listener = listen(line.place(f"shard-{number}-{line.name}"))
        self._address = listener.address
        threading.Thread(target=self._server.serve, args=(listener, line.token), name="serve", daemon=True).start()

    def run(self) -> None:
        """Do what the driver says."""
        self._line.say(Message("ready", {"address": self._address}))
        does: dict[str, Callable[[Message], None]] = {
            "copy": self._copy,
            "promote": self._promote,
            "configure": self._configure,
            "read": self._read,
            "write": self._write,
        }
        threading.Thread(target=or_end, args=(self._hear,), name="hear", daemon=True).start()
        while True:
            message = self._told.get()
            if message.kind not in does:
                raise WorkerError(
                    f"{self._line.name} holds a shard, and was told {message.kind!r}, which it cannot do."
                )
            does[message.kind](message)
            self._line.progress()

    def _hear(self) -> None:
        """What is told, in turn; but that a copy is lost at once, as the one before it may wait for that copy."""
        while True:
            message = self._line.next(LONGEST_WAIT_S)
            if message is not None and message.kind == "copy_lost":
                self._server.leave_copy(message.fields["member"])
            elif message is not None:
                self._told.put(message)

    def _copy(self, message: Message) -> None:
        """Have another member follow. In a thread: it may be lost meanwhile, and another one take its place."""
        threading.Thread(target=self._give_copy, args=(message.fields,), name="give copy", daemon=True).start()

    def _give_copy(self, fields: Mapping[str, Any]) -> None:
        member = fields["member"]

        def lost(why: str) -> None:
            self._line.say(Message("uncopied", {"member": member, "why": why}))

        try:
            connection = dial(fields["address"], self._line.token, {"shard": self._line.name}, _DIAL_S)
            self._server.attach_copy(connection, member, on_lost=lost, on_progress=self._line.progress)
        except MillraceError as error:
            traceback.print_exc(file=sys.stderr)
            lost(str(error))
        else:
            self._line.say(Message("copied", {"member": member}))

    def _promote(self, message: Message) -> None:
        self._server.promote()
        self._line.say(Message("promoted", {"version": self._server.report()["version"]}))

    def _configure(self, message: Message) -> None:
        self._server.configure(Sync(message.fields["needed"]), ())
        self._line.say(Message("configured"))

    def _read(self, message: Message) -> None:
        values: dict[str, Tensor] = {VARIABLE + name: value for name, value in self._server.read().items()}
        self._line.say(Message("read", {}, values))

    def _write(self, message: Message) -> None:
        self._server.write({n.removeprefix(VARIABLE): t for n, t in message.tensors.items()})
        self._line.say(Message("written"))
