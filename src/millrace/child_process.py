"""Children of this process that run a module of ours, and end when it does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Child(Protocol):
    """What can be asked of a child that leads a process group, as `subprocess.Popen` has it."""

    pid: int
    returncode: int | None  # None until it was waited for; minus its number where a signal ended it

    def wait(self, timeout: float | None = None) -> int:
        """The `returncode`, once it has ended. Raises: subprocess.TimeoutExpired."""
        ...


def modules_path() -> list[str]:
    """Where a child is to look for modules, to see the same as this process."""
    return [os.path.abspath(directory) for directory in sys.path if directory]


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    errors: IO[bytes] | int,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module`, which sees the same modules as this process.

    Args: errors: where its standard error goes. environment: beside this process's own. descriptors: open files that it
        inherits under the same numbers.
    """
    # -P: the working directory must not shadow modules that it does not shadow here.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(modules_path()),
            **(environment or {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=tuple(descriptors),
        start_new_session=True,  # Ctrl-C is for the run; its own children end with the group
    )


def end_with(parent: int) -> None:
    """Have the kernel end this process when the parent ends, also by a kill that lets it end nothing itself (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        sys.exit(1)


def give_way(niceness: int) -> None:
    """Leave the cores to others where these want them; so do the children of this process.

    Linux may share the cores between sessions first (sched_autogroup), and then the niceness of a process counts only
    within its own. A child is a session of its own, so it says the same of that.
    """
    os.nice(niceness)
    with contextlib.suppress(OSError):  # there are no such groups
        Path("/proc/self/autogroup").write_text(str(os.nice(0)))


def show_as(name: str) -> None:
    """Have `ps -o comm` and `top` show this process under a name, of which they show 15 characters (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))
