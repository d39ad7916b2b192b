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
from millrace.errors import MillraceError, OutOfMemoryError, WorkerError
from millrace.partition.files import load_program
from millrace.partition.program import DeviceProgram, Edge, Instruction, Run
from millrace.runtime.device import DeviceRunner
from millrace.runtime.hardware_fault import is_hardware_fault
from millrace.runtime.messages import Message, receive, send
from millrace.runtime.out_of_memory import is_out_of_memory
from millrace.runtime.transport.base import Transport
from millrace.runtime.transport.choose import Meeting, connect

Connect = Callable[[str, Sequence[Edge], Meeting], Transport]
_LIBRARIES_BYTES = 128 * 2**20  # of scratch that kernels, threads and loaded programs take beside the tensors
_LESS_MEMORY = (
    "  Put less on it (a smaller batch, more replicas or microbatches, another placement), or let it have more memory."
)
_FOREVER_S = 10.0 * 365 * 86400  # the driver may think as long as it likes; when it ends, so does the worker


class DeviceWorker:
    """One device. variables: name -> tensor, updated in place by its steps.

    torch_device: what PyTorch calls the device; variables and all that is computed are there.
    """

    def __init__(self, device: str, connect: Connect, torch_device: str = "cpu") -> None:
        self.device = device
        self._torch_device = torch.device(torch_device)
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
            return error_message(error)
        return answer

    def close(self) -> None:
        """End the transports; the peers learn of it."""
        for _, transport in self._programs.values():
            transport.close()
        self._programs.clear()

    def load(self, key: int, program: DeviceProgram, edges: Sequence[Edge], fields: Mapping[str, Any]) -> None:
        """Make a program ready to run under the number `key`."""
        runner = DeviceRunner(
            program,
            edges,
            self.variables,
            device=self._torch_device,
            compile=fields["compile"],
            say=self._said.append,
        )
        meeting = Meeting(
            fields["transport"], Path(fields["meeting"]), tuple(fields["devices"]), float(fields["timeout_s"])
        )
        transport = self._connect(self.device, edges, meeting)
        self._programs[key] = (runner, transport)

    def _on_program(self, fields: Mapping[str, Any], _: Mapping[str, Tensor]) -> Message:
        program, edges = load_program(Path(fields["directory"]))
        self.load(fields["key"], program, edges, fields)
        return Message("ready")

    def _on_write(self, _: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        for name, value in tensors.items():
            if name in self.variables:
                self.variables[name].copy_(value)
            else:
                self.variables[name] = value.to(self._torch_device, copy=True)
        return Message("written")

    def _on_read(self, fields: Mapping[str, Any], _: Mapping[str, Tensor]) -> Message:
        return Message("values", {}, {name: self.variables[name] for name in fields["names"]})

    def _on_step(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        if fields["key"] not in self._programs:
            raise WorkerError(f"{self.device} has given up this program after an earlier error.")
        runner, transport = self._programs[fields["key"]]
        times: list[float] = []

        def note(_: Instruction | Run) -> None:
            if fields["timeline"]:
                runner.wait()  # for what came before: a GPU would still be at it
                times.append(time.monotonic())

        transport.begin_step(fields["step"])
        values = runner.step(tensors, transport, fields["timeout_s"], note)
        if times:
            times.append(time.monotonic())
        said, self._said[:] = list(self._said), []
        done = {"times": times, "said": said, "tiers": runner.tiers, "sent": list(transport.sent_bytes.items())}
        return Message("done", done, values)


def error_message(error: Exception) -> Message:
    """What a process answers when it could not do what it was told; `workers.answered_error` reads it."""
    known = type(error).__name__ if isinstance(error, MillraceError) else ""
    text = str(error) if known else f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        known, text = OutOfMemoryError.__name__, f"it ran out of memory: {text}\n{_LESS_MEMORY}"
    elif is_hardware_fault(error):
        known, text = WorkerError.__name__, f"its device failed: {text}"
    return Message("error", {"type": known, "text": text})


def _begin(start: Mapping[str, Any]) -> DeviceWorker:
    """The worker that the driver's first message asks for, and this process made ready for it."""
    torch.set_num_threads(start["threads"])
    torch.set_grad_enabled(False)
    for name in start["imports"]:
        importlib.import_module(name)
    torch_device = torch.device(start["torch_device"])
    if torch_device.type == "cuda":
        take_gpu(start["device"], torch_device, start["memory_bytes"])
    elif start["memory_bytes"] is not None:
        hold_to(start["memory_bytes"])

    def meet(device: str, edges: Sequence[Edge], meeting: Meeting) -> Transport:
        return connect(device, edges, meeting, start["address"])

    return DeviceWorker(start["device"], meet, start["torch_device"])


def take_gpu(name: str, device: torch.device, memory_bytes: int | None = None) -> None:
    """Make a GPU this process's own one, and hold it to so much of its memory."""
    count = torch.cuda.device_count()
    if device.index >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise WorkerError(
            f"{name} is to run on {device}, but PyTorch {torch.__version__} sees {count} CUDA devices here{seen}. "
            "`millrace devices` lists the devices of this machine: choose among those."
        )
    torch.cuda.set_device(device)
    if memory_bytes is not None:
        whole_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / whole_bytes), device)


def hold_to(memory_bytes: int) -> None:
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
    try:
        worker = _begin(start.fields)
    except Exception as error:
        send(connection, error_message(error), _FOREVER_S, "the driver")
        return 1
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
