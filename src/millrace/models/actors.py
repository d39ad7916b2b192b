"""Actors: processes that play games by the learner's weights, and fill the replay memory that they share with it.

The learner asks for some rows and goes on learning from earlier ones while they are played. Only once it has waited for
them does it give new weights and ask for more; so what is learned from what depends on no clock, and a run can be
repeated. An actor that ends by itself is replaced, and its games begin anew.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO

import torch
from torch import Tensor

from millrace.child_process import Child
from millrace.errors import WorkerError
from millrace.fork_server import fork_module
from millrace.graph.graph import Graph
from millrace.graph.save import graph_bytes
from millrace.models.actor import weights_in
from millrace.models.replay import Rows, RowsShape
from millrace.runtime.launch import end_all
from millrace.runtime.messages import Message, receive, send
from millrace.runtime.transport.slots import allocate_bytes

_ANSWER_S = 300.0  # for one round, on a machine that may be busy
_MOST_REPLACED = 3
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Playing:
    """How actors play."""

    game: str
    actors: int
    games: int  # of each
    lives_count: bool  # whether to lose a life counts as an end
    longest: int  # steps of a game, of Atari's
    clipped: bool  # whether only the sign of rewards counts
    seed: int


@dataclass(frozen=True)
class Round:
    """What actors were asked for."""

    first: int  # row
    count: int  # rows
    epsilon: float  # share of actions taken at random
    restart: bool  # whether all games begin anew


@dataclass
class _Process:
    child: Child
    connection: socket.socket
    log: IO[bytes]


class Actors:
    """Processes that fill `rows`; close it, or use it as a context, to end them.

    Args:
        playing: how.
        shape: of the memory.
        policy: fetches the best "actions" [lanes] by observations [lanes, stack, *frame].
    """

    def __init__(self, playing: Playing, shape: RowsShape, policy: Graph) -> None:
        self._playing, self._shape = playing, shape
        self._policy = torch.frombuffer(bytearray(graph_bytes(policy)), dtype=torch.uint8)
        size_bytes = shape.size_bytes + sum(variable.spec.size_bytes for variable in policy.variables)
        self._descriptor = allocate_bytes("the replay memory", size_bytes)
        memory = mmap.mmap(self._descriptor, size_bytes)
        self.rows = Rows(shape, memory)
        self._weights = weights_in(policy, memory, shape.size_bytes)
        self._asked: Round | None = None
        self._replaced = 0
        self._processes: dict[int, _Process] = {}
        try:
            for number in range(playing.actors):
                self._start(number)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.child.pid for process in self._processes.values()]

    @property
    def busy(self) -> bool:
        """Whether a round is being played."""
        return self._asked is not None

    def publish(self, weights: Mapping[str, Tensor]) -> None:
        """Give the policy's variables these values, of their names. Only while no round is being played."""
        assert not self.busy
        with torch.no_grad():
            for name, tensor in self._weights.items():
                tensor.copy_(weights[name])

    def ask(self, round: Round) -> None:
        """Have a round played; returns at once."""
        assert not self.busy
        self._asked = round
        for process in self._processes.values():
            self._tell(process, round)

    def wait(self) -> tuple[list[float], list[float]]:
        """Wait for the round: the scores of the games that ended in it, and of those that go on.

        Raises: WorkerError when actors end again and again, or one does not answer.
        """
        finished: list[float] = []
        running: list[float] = []
        for number in list(self._processes):
            answer = self._answer(number)
            finished += answer.fields["finished"]
            running += answer.fields["running"]
        self._asked = None
        return finished, running

    def close(self) -> None:
        """End the processes. A second call does nothing."""
        processes, self._processes = self._processes, {}
        end_all([process.child for process in processes.values()])
        for process in processes.values():
            process.connection.close()
            process.log.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)  # the memory goes with the last array over it
            self._descriptor = -1

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process lives)
        with theirs:
            child = fork_module(
                "millrace.models.actor",
                [str(os.getpid()), str(theirs.fileno()), str(self._descriptor)],
                errors=log,
                environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                descriptors=[theirs.fileno(), self._descriptor],
            )
        self._processes[number] = _Process(child, ours, log)
        fields = {
            **asdict(self._playing),
            **asdict(self._shape),
            "seed": self._playing.seed + self._replaced,
            "first_lane": number * self._playing.games,
        }
        with contextlib.suppress(WorkerError):  # whoever waits for its answer learns that it has ended
            send(ours, Message("begin", fields, {"policy": self._policy}), _ANSWER_S, f"actor {number}")

    def _tell(self, process: _Process, round: Round) -> None:
        with contextlib.suppress(WorkerError):
            send(process.connection, Message("play", asdict(round)), _ANSWER_S, "an actor")

    def _answer(self, number: int) -> Message:
        """What an actor answers; where it has ended or is stuck, what another in its place does."""
        while True:
            process = self._processes[number]
            try:
                return receive(process.connection, _ANSWER_S, f"actor {number}")
            except WorkerError as error:
                self._replace(number, process, error)

    def _replace(self, number: int, process: _Process, error: WorkerError) -> None:
        end_all([process.child])
        words = _last_words(process.log)
        process.connection.close()
        process.log.close()
        if self._replaced == _MOST_REPLACED:
            raise WorkerError(
                f"Actor {number}, which plays {self._playing.game}, has ended or is stuck, as {self._replaced} others "
                f"were before it{f'; its last words: {words!r}' if words else ''}. The run can go on from its last "
                "checkpoint when that is mended."
            ) from error
        self._replaced += 1
        self._start(number)
        assert self._asked is not None
        self._tell(self._processes[number], self._asked)


def _last_words(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
