"""The processes that are a session's devices, and talking to all of them at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from millrace import errors
from millrace.child_process import Child
from millrace.errors import MillraceError, WorkerError
from millrace.fork_server import fork_module
from millrace.place.cluster import Device
from millrace.runtime.messages import LONGEST_WAIT_S, Message, readable, receive, send, silent

DEVICE_WORKER = "millrace.runtime.device_worker"  # what each of them runs
_START_TIMEOUT_S = 120.0
_LOOPBACK = "127.0.0.1"  # all are here
_GRACE_S = 2.0  # for the others to answer once one has failed
_END_TIMEOUT_S = 10.0


class Workers(Protocol):
    """All devices of a session."""

    directory: Path  # for files that driver and workers share; private to the user

    def ask(self, messages: Mapping[str, Message], timeout_s: float) -> dict[str, Message]:
        """Send each device its message, and wait for all answers.

        Raises: what a device answered, if that is an error: the one that is a cause rather than a consequence.
            WorkerError when a device has ended or does not answer in time; then the others are ended as well.
        """
        ...

    def close(self) -> None:
        """End all of them. A second call does nothing."""
        ...


class ProcessWorkers:
    """One process on this host for each device, whatever host its name says: a CPU with its threads, or a GPU.

    imports: modules that every worker imports first, for operators that they register. hold_to_memory: whether a
    worker may not take more for its data than the device's memory (and on a CPU 128 MiB for libraries); asking for
    more is then an error of the step. base: where to make the directory that they share; None: where the system has
    temporary ones.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        imports: Sequence[str] = (),
        hold_to_memory: bool = False,
        base: Path | None = None,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="millrace-workers-", dir=base)  # only this user may enter
        self.directory = Path(self._temporary.name)
        self._children: dict[str, Child] = {}
        self._connections: dict[str, socket.socket] = {}
        self._finalizer = weakref.finalize(self, _end, self._children, self._connections, self._temporary)
        for device in devices:
            ours, theirs = socket.socketpair()
            with theirs, open(self._log(device.name), "wb") as log:
                self._children[device.name] = _start(theirs, log, device)
            self._connections[device.name] = ours
        messages = {
            device.name: Message(
                "start",
                {
                    "device": device.name,
                    "torch_device": device.torch_device,
                    "threads": device.threads,
                    "imports": list(imports),
                    "memory_bytes": device.memory_bytes if hold_to_memory else None,
                    "address": _LOOPBACK,
                },
            )
            for device in devices
        }
        try:
            self.ask(messages, _START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[str, int]:
        """The process of every device."""
        return {device: child.pid for device, child in self._children.items()}

    def ask(self, messages: Mapping[str, Message], timeout_s: float) -> dict[str, Message]:
        """See `Workers.ask`."""
        if not self._connections:
            raise WorkerError(
                "this session's workers were ended after an earlier error, or it was closed. Make it anew."
            )
        failures: list[MillraceError] = []
        answers: dict[str, Message] = {}
        for device, message in messages.items():
            try:
                send(self._connections[device], message, timeout_s, self._name(device))
            except WorkerError as error:
                failures.append(self._explained(device, error))
        waiting = {} if failures else {self._connections[device]: device for device in messages}
        began_s = time.monotonic()
        deadline_s = began_s + timeout_s
        while waiting:
            left_s = max(0.0, deadline_s - time.monotonic())
            ready = readable(waiting, min(left_s, LONGEST_WAIT_S))
            for connection in ready or (list(waiting) if left_s == 0.0 else []):
                device = waiting.pop(connection)
                try:
                    if not ready:
                        raise WorkerError(silent(self._name(device), time.monotonic() - began_s))
                    answers[device] = receive(connection, timeout_s, self._name(device))
                except WorkerError as error:
                    failures.append(self._explained(device, error) if ready else error)
                if failures or answers[device].kind == "error":  # the others may wait for this one, and long
                    deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
        answered = answered_error(answers)
        if failures:
            self.close()  # whoever has not answered is not to be waited for again
            if answered is None or isinstance(answered, WorkerError):
                raise failures[0] from answered  # which tells of a wait for this one
        if answered is not None:
            raise answered
        return answers

    def close(self) -> None:
        """See `Workers.close`."""
        self._finalizer()

    def _name(self, device: str) -> str:
        return f"the worker of {device} (process {self._children[device].pid})"

    def _log(self, device: str) -> Path:
        return self.directory / f"{device.strip('/').replace('/', '-').replace(':', '')}.log"

    def _explained(self, device: str, error: WorkerError) -> WorkerError:
        """The error with how the process ended and the last that it said, if it said anything."""
        child = self._children[device]
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
        how = ""
        if child.returncode is not None and child.returncode < 0:
            how = f" It was killed by {signal.Signals(-child.returncode).name}."
        said = self._log(device).read_text(errors="replace").strip().splitlines()[-1:]
        return WorkerError(f"{error}{how}" + (f" Its last words: {said[0]}" if said else ""))


def answered_error(answers: Mapping[str, Message]) -> MillraceError | None:
    """The error that some device answered with, if one did; where all only waited for others, what each waited for."""
    waits: list[str] = []
    for device, message in answers.items():
        if message.kind == "error":
            kind, text = message.fields["type"], message.fields["text"]
            said: str = text if text.startswith(device) else f"{device}: {text}"
            if kind != WorkerError.__name__:
                cause: MillraceError = getattr(errors, kind, errors.StepError)(said)
                return cause
            waits.append(said)
    return WorkerError("\n".join(waits)) if waits else None


def _start(connection: socket.socket, log: IO[bytes], device: Device) -> Child:
    threads = {"OMP_NUM_THREADS": str(device.threads), "MKL_NUM_THREADS": str(device.threads)}
    return fork_module(
        DEVICE_WORKER,
        [str(connection.fileno()), str(os.getpid())],
        errors=log,
        environment=threads,
        descriptors=[connection.fileno()],
    )


def _end(
    children: dict[str, Child],
    connections: dict[str, socket.socket],
    directory: tempfile.TemporaryDirectory[str],
) -> None:
    for connection in connections.values():
        connection.close()
    connections.clear()
    for child in children.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # nothing is lost: variables are gone with any of them
    for child in children.values():
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the system; it will not come back from there
            child.wait(_END_TIMEOUT_S)
    directory.cleanup()
