"""All devices of a session in its own process, one thread each: for tests, and to look at a placement."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from millrace.errors import WorkerError
from millrace.partition.program import Edge
from millrace.runtime.device_worker import DeviceWorker
from millrace.runtime.messages import Message
from millrace.runtime.transport.base import Transport
from millrace.runtime.transport.choose import Meeting
from millrace.runtime.transport.in_process import InProcessTransport, connect
from millrace.runtime.workers import answered_error


class ThreadWorkers:
    """See `millrace.runtime.workers.Workers`."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="millrace-workers-")
        self.directory = Path(self._temporary.name)
        self._devices = tuple(devices)
        self._met: dict[Path, dict[str, InProcessTransport]] = {}
        self._lock = threading.Lock()
        self._workers = {device: DeviceWorker(device, self._connect) for device in devices}
        self._pool = ThreadPoolExecutor(len(devices), thread_name_prefix="millrace-device")

    def ask(self, messages: Mapping[str, Message], timeout_s: float) -> dict[str, Message]:
        """See `Workers.ask`."""
        futures = {d: self._pool.submit(self._workers[d].handle, message) for d, message in messages.items()}
        try:
            answers = {device: future.result(timeout_s) for device, future in futures.items()}
        except FutureTimeoutError:
            late = [device for device, future in futures.items() if not future.done()]
            raise WorkerError(f"{', '.join(late)} did not answer within {timeout_s:g} s.") from None
        error = answered_error(answers)
        if error is not None:
            raise error
        return answers

    def close(self) -> None:
        """See `Workers.close`."""
        for worker in self._workers.values():
            worker.close()
        self._pool.shutdown()
        self._temporary.cleanup()

    def _connect(self, device: str, edges: Sequence[Edge], meeting: Meeting) -> Transport:
        with self._lock:  # whatever transport was asked for: they have one memory
            if meeting.directory not in self._met:
                self._met[meeting.directory] = connect(self._devices, edges)
            return self._met[meeting.directory][device]
