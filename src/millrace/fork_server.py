"""A process that has imported what its children need, and makes each of them by a fork: in milliseconds, not seconds.

It has one thread and no state beside its modules, so a fork of it is as good as a new process. Its children become
those of the process that asked ("child subreaper", Linux): they are waited for, killed and ended with that one like any
other, and outlive the server. Elsewhere than on Linux children are started plainly.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from millrace.child_process import Child, modules_path, show_as, start_module

_LENGTH = struct.Struct("<I")
_PID = struct.Struct("<i")
_GO = b"\0"
_MOST_DESCRIPTORS = 16
_IMPORT_TIMEOUT_S = 180.0  # on a machine that may be busy
_FORK_TIMEOUT_S = 20.0
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
# Names of settings that libraries read when they are imported: a server that has read others is of no use any more.
_SETTINGS = ("CUDA", "GLOO", "KMP", "LD_", "MILLRACE", "MKL", "NCCL", "OMP", "OPENBLAS", "PYTHON", "TORCH", "TRITON")


def fork_module(
    module: str,
    arguments: Sequence[str],
    *,
    errors: IO[bytes],
    environment: Mapping[str, str],
    descriptors: Sequence[int] = (),
) -> Child:
    """Start `python -m module` as `child_process.start_module` does, by a fork of this process's server.

    What the module imports is imported by the server, once; the module itself does nothing when it is imported. For any
    thread.
    """
    if sys.platform != "linux":
        return start_module(module, arguments, errors=errors, environment=environment, descriptors=descriptors)
    request = {
        "module": module,
        "arguments": list(arguments),
        "environment": {**os.environ, **environment},
        "path": modules_path(),
        "directory": os.getcwd(),
        "descriptors": list(descriptors),
    }
    with _lock:
        for _ in range(2):  # the server may have been killed, or be stuck
            with contextlib.suppress(OSError):
                return ForkedChild(_ask(lambda server: server.fork(request, [errors.fileno(), *descriptors])))
    return start_module(module, arguments, errors=errors, environment=environment, descriptors=descriptors)


def prepare(module: str) -> None:
    """Have this process's server import what a module imports, beside whatever else is done: then it forks at once."""
    if sys.platform == "linux":
        threading.Thread(target=_prepare, args=(module,), name="millrace-prepare", daemon=True).start()


def _prepare(module: str) -> None:
    with _lock, contextlib.suppress(OSError):  # whoever forks will see
        _ask(lambda server: server.prepare(module))


class ForkedChild:
    """A child of this process that `subprocess` has not started. See `Child`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended; of a signal, minus its number. Raises: subprocess.TimeoutExpired."""
        with self._waiting:
            if self.returncode is None:
                ended = os.pidfd_open(self.pid)
                try:
                    polled = select.poll()
                    polled.register(ended, select.POLLIN)
                    if not polled.poll(None if timeout is None else 1000.0 * timeout):
                        raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
                finally:
                    os.close(ended)
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode


class _Server:
    """This process's end of the line to its server."""

    def __init__(self) -> None:
        self.settings = _settings()
        self._imported: set[str] = set()
        self._ours, theirs = socket.socketpair()
        with theirs:
            self.process = start_module(
                "millrace.fork_server",
                [str(theirs.fileno())],
                errors=subprocess.DEVNULL,  # children have files of their own
                environment={"OMP_NUM_THREADS": "1"},  # libraries that start threads when imported start none
                descriptors=[theirs.fileno()],
            )

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        with _adopting():
            pid = self._answer(request, descriptors)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def prepare(self, module: str) -> int:
        return self._answer({"module": module, "path": modules_path(), "only_import": True}, [])

    def _answer(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        body = json.dumps(request).encode()
        self._ours.settimeout(_FORK_TIMEOUT_S if request["module"] in self._imported else _IMPORT_TIMEOUT_S)
        socket.send_fds(self._ours, [_LENGTH.pack(len(body))], descriptors)
        self._ours.sendall(body)
        (answer,) = _PID.unpack(_receive(self._ours, _PID.size))
        self._imported.add(request["module"])
        return int(answer)

    def end(self) -> None:
        self._ours.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_server: _Server | None = None


def _ask(question: Callable[[_Server], int]) -> int:
    """What the server answers. Raises: OSError when it has ended, cannot or does not answer."""
    global _server
    if _server is not None and _server.settings != _settings():
        _end_server()
    if _server is None:
        _server = _Server()
    try:
        return question(_server)
    except BaseException:  # also Ctrl-C: what is answered late must not be taken for the answer to the next request
        _end_server()
        raise


def _end_server() -> None:
    global _server
    if _server is not None:
        _server.end()
        _server = None


def _forget_server() -> None:
    """In a fork of this process: the server is the parent's."""
    global _server, _lock
    _server, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_server)


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}


@contextmanager
def _adopting() -> Iterator[None]:
    """While this lasts, processes below this one whose parents end become its own children."""
    system = ctypes.CDLL(None)
    before = ctypes.c_int()
    system.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        system.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def _receive(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise ConnectionError("the other side has ended")
        found += piece
    return found


def main(arguments: list[str]) -> None:
    """Serve whoever holds the other end of the socket with this descriptor, until it is closed."""
    connection = socket.socket(fileno=int(arguments[0]))
    while True:
        length, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _MOST_DESCRIPTORS)
        if not length:
            return
        request = json.loads(_receive(connection, _LENGTH.unpack(length)[0]))
        _import_needs(request)
        if request.get("only_import"):
            connection.sendall(_PID.pack(0))
            continue
        pid, go = _fork_twice()
        if not pid:
            connection.close()
            return _become(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(_PID.pack(pid))
        if go is not None:
            with contextlib.suppress(BrokenPipeError):  # it has been killed since
                os.write(go, _GO)
            os.close(go)


def _import_needs(request: Mapping[str, Any]) -> None:
    """Import what the module imports. It itself is left to be run as `__main__`."""
    sys.path[:] = request["path"]
    try:
        importlib.import_module(request["module"])
    except (Exception, SystemExit):
        return  # the child fails in the same way, and has a file to say so
    sys.modules.pop(request["module"], None)
    gc.collect()
    gc.freeze()  # so that children's collections do not write to all the pages that they share


def _fork_twice() -> tuple[int, int | None]:
    """A grandchild whose parent has ended, so that it is the child of the one that adopts.

    It leads a group of its own, and waits to be told by a byte that it may go on.

    Returns: its process and where to write that byte. In the grandchild itself: 0 and None. When there can be no more
        processes: minus the number of the error, and None.
    """
    pid_read, pid_write = os.pipe()
    go_read, go_write = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        os.write(pid_write, _PID.pack(-(error.errno or errno.EAGAIN)))
        child = -1
    if child == 0:
        os.close(go_write)
        _be_grandchild(pid_write, go_read)
        os.close(pid_read)
        return 0, None
    os.close(pid_write)
    os.close(go_read)
    if child > 0:
        os.waitpid(child, 0)
    (pid,) = _PID.unpack(os.read(pid_read, _PID.size) or _PID.pack(-errno.ECHILD))
    os.close(pid_read)
    if pid > 0:
        return pid, go_write
    os.close(go_write)
    return pid, None


def _be_grandchild(pid_write: int, go_read: int) -> None:
    """Fork once more and end; in the new process, say who it is and wait."""
    try:
        if os.fork():
            os._exit(0)
    except OSError as error:
        os.write(pid_write, _PID.pack(-(error.errno or errno.EAGAIN)))
        os._exit(1)
    os.setsid()  # before anybody can know of it: whoever does may kill its group
    os.write(pid_write, _PID.pack(os.getpid()))
    os.close(pid_write)
    if os.read(go_read, 1) != _GO:
        os._exit(1)  # the server has ended, and its user does not know of this process
    os.close(go_read)


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Be the process that was asked for."""
    show_as(request["module"].rpartition(".")[2])  # the command line stays the server's
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    numbers = (2, *request["descriptors"])
    apart = [fcntl.fcntl(received, fcntl.F_DUPFD, max(numbers) + 1) for received in descriptors]
    for received in descriptors:
        os.close(received)
    for number, descriptor in zip(numbers, apart, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if "torch" in sys.modules:  # which has read the server's setting
        sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
