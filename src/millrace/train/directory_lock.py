"""One writer per directory: a lock that the kernel frees when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO

from millrace.errors import RunDirectoryError

LOCK_NAME = "lock"
_ATTEMPTS, _PAUSE_S = 10, 0.01


class DirectoryLock:
    """An exclusive `flock` on `directory/lock`, held from construction to `release` or the death of this process.

    The file's text names the holder, for the message to whoever comes second; it decides nothing. A forked child
    (a DataLoader worker) does not keep the lock alive after its parent: see `_close_in_forked_child`.

    Raises:
        RunDirectoryError: another run holds the lock (the message names its process), or locking is impossible here.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (held open: that is the lock)
        except OSError as error:
            raise RunDirectoryError(
                f"Cannot open {path}: {error.strerror}. A run must be able to write in its directory: "
                "permit that, or choose another directory."
            ) from error
        try:
            _lock(self._file)
        except OSError as error:
            self._file.close()
            raise RunDirectoryError(_refusal(directory, path, error)) from error
        _held.add(self)
        with contextlib.suppress(OSError):  # a full disk: the name only makes a message better
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def release(self) -> None:
        """Free the lock; calling it again does nothing."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def close_without_unlocking(self) -> None:
        """Forget the lock in a forked child: the lock belongs to the open file, which the parent still has."""
        self._file.close()


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_in_forked_child() -> None:
    # A flock lives as long as any process has the open file: an orphaned worker would keep a dead run's directory busy.
    for lock in list(_held):
        lock.close_without_unlocking()


os.register_at_fork(after_in_child=_close_in_forked_child)


def is_locked(directory: Path) -> bool:
    """Whether a run holds `directory` now, in this process or another; True where that cannot be known."""
    try:
        with open(directory / LOCK_NAME, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file closes
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(file: IO[bytes]) -> None:
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_PAUSE_S)  # `is_locked` in another process may hold it for an instant
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _refusal(directory: Path, lock_path: Path, error: OSError) -> str:
    if not isinstance(error, BlockingIOError):
        return (
            f"Cannot lock {lock_path}: {error.strerror}. The file system must support locks, so that two runs cannot "
            "write in one directory: choose a directory on a local disk."
        )
    return (
        f"{directory} is in use by a run in {_holder(lock_path)}. Wait for that run or end it, then resume it; "
        "or choose another directory."
    )


def _holder(lock_path: Path) -> str:
    try:
        holder = json.loads(lock_path.read_text())
        pid, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, LookupError, TypeError):  # it holds the lock, but has not written its name yet
        return "another process"
    if host != socket.gethostname():
        return f"process {pid} on {host}"
    return f"process {pid}" + (" (this one: close its earlier run)" if pid == os.getpid() else "")
