"""The worker that is a device: it holds variables and programs, and does what the driver's messages say.

As a process: `python -m millrace.runtime.device_worker DESCRIPTOR PARENT_PID`, where DESCRIPTOR is its end of a socket
to the driver. As a plain object it serves drivers that keep all devices in their own process.
"""

from __future__ import annotations

import importlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.child_process import end_with
from millrace.errors import MillraceError, WorkerError
from millrace.graph.save import load_graph
from millrace.partition.files import load_program
from millrace.partition.program import DeviceProgram, Edge, Instruction, Run
from millrace.place.profile import kinds_of, measure
from millrace.runtime.device import DeviceRunner
from millrace.runtime.messages import Message, receive, send
from millrace.runtime.transport.base import Transport
from millrace.runtime.transport.shared_memory import connect

Connect = Callable[[str, Sequence[Edge], Path, float], Transport]
_LIBRARIES_BYTES = 128 * 2**20  # of scratch that kernels, threads and loaded programs take beside the tensors
_FOREVER_S = 10.0 * 365 * 86400  # the driver may think as long as it likes; when it ends, so does the worker


class DeviceWorker:
    """One device. variables: name -> tensor, updated in place by its steps."""

    def __init__(self, device: str, connect: Connect) -> None:
        self.device = device
        self.variables: dict[str, Tensor] = {}
        self._connect = connect
        self._programs: dict[int, tuple[DeviceRunner, Transport]] = {}
        self._said: list[str] = []

    def handle(self, message: Message) -> Message:
        """The answer to a message. An error is an answer, too: kind "error", with its type and text."""
        try:
            answer: Message = getattr(self, f"_on_{message.kind}")(message.fields, message.tensors)
        except Exception as error:
            self.close()  # whoever waits for this device learns that nothing will come
            known = type(error).__name__ if isinstance(error, MillraceError) else ""
            text = str(error) if known else f"{type(error).__name__}: {error}"
            return Message("error", {"type": known, "text": text})
        return answer

    def close(self) -> None:
        """End the transports; the peers learn of it."""
        for _, transport in self._programs.values():
            transport.close()
        self._programs.clear()

    def load(self, key: int, program: DeviceProgram, edges: Sequence[Edge], fields: Mapping[str, Any]) -> None:
        """Make a program ready to run under the number `key`."""
        runner = DeviceRunner(program, edges, self.variables, compile=fields["compile"], say=self._said.append)
        transport = self._connect(self.device, edges, Path(fields["meeting"]), fields["timeout_s"])
        self._programs[key] = (runner, transport)

    def _on_program(self, fields: Mapping[str, Any], _: Mapping[str, Tensor]) -> Message:
        program, edges = load_program(Path(fields["directory"]))
        self.load(fields["key"], program, edges, fields)
        return Message("ready")

    def _on_measure(self, fields: Mapping[str, Any], _: Mapping[str, Tensor]) -> Message:
        kinds = kinds_of(load_graph(fields["path"]), fused=fields["fused"])
        return Message("measured", {"seconds": measure(kinds, fields["budget_s"])})

    def _on_write(self, _: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        for name, value in tensors.items():
            if name in self.variables:
                self.variables[name].copy_(value)
            else:
                self.variables[name] = value.clone()
        return Message("written")

    def _on_read(self, fields: Mapping[str, Any], _: Mapping[str, Tensor]) -> Message:
        return Message("values", {}, {name: self.variables[name] for name in fields["names"]})

    def _on_step(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        if fields["key"] not in self._programs:
            raise WorkerError(f"{self.device} has given up this program after an earlier error.")
        runner, transport = self._programs[fields["key"]]
        times: list[float] = []
        note = (lambda _: times.append(time.monotonic())) if fields["timeline"] else _ignore
        transport.begin_step(fields["step"])
        values = runner.step(tensors, transport, fields["timeout_s"], note)
        if times:
            times.append(time.monotonic())
        said, self._said[:] = list(self._said), []
        return Message("done", {"times": times, "said": said, "tiers": runner.tiers}, values)


def _ignore(_: Instruction | Run) -> None:
    pass


def _shared_memory(device: str, edges: Sequence[Edge], directory: Path, timeout_s: float) -> Transport:
    return connect(device, edges, directory, timeout_s)


def _hold_to(memory_bytes: int) -> None:
    """Have the system refuse memory beyond what the process has now, so much more, and what libraries need (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    limit = int(line.split()[1]) * 1024 + memory_bytes + _LIBRARIES_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(arguments: list[str]) -> int:
    """Serve the driver until it says "end" or ends itself."""
    descriptor, parent = (int(a) for a in arguments)
    end_with(parent)
    connection = socket.socket(fileno=descriptor)
    start = receive(connection, _FOREVER_S, "the driver")
    torch.set_num_threads(start.fields["threads"])
    torch.set_grad_enabled(False)
    for name in start.fields["imports"]:
        importlib.import_module(name)
    if start.fields["memory_bytes"] is not None:
        _hold_to(start.fields["memory_bytes"])
    worker = DeviceWorker(start.fields["device"], _shared_memory)
    send(connection, Message("ready", {"pid": os.getpid()}), _FOREVER_S, "the driver")
    while True:
        try:
            message = receive(connection, _FOREVER_S, "the driver")
        except WorkerError:
            return 0  # it has ended
        if message.kind == "end":
            worker.close()
            return 0
        send(connection, worker.handle(message), _FOREVER_S, "the driver")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
