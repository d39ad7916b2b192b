"""Starting the processes of a run, and ending them for certain. Here: plain processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from millrace.child_process import Child
from millrace.fork_server import fork_module

_END_TIMEOUT_S = 10.0
_TAIL_BYTES = 4096
_SHORT_OF_MEMORY = "the system has been ending processes for lack of memory: use a smaller batch, or fewer processes"


class Launcher(Protocol):
    """Processes by name. For one thread, which outlives them: Linux ends them with the thread that started them.

    where: an address to listen at so that all of them can dial in; None where a socket in a directory will do.
    """

    where: str | None

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        """Start one; a name is used once.

        Args: environment: beside this process's own; what is secret goes here, as all users see command lines.

        Raises: PlacementError when there is no room for it, ever.
        """
        ...

    def kill(self, name: str) -> None:
        """End it and its own children by SIGKILL. Returns at once; a second call does nothing."""
        ...

    def exit_of(self, name: str) -> str | None:
        """How it ended ("was killed by SIGKILL", "exited with 1"), or None while it lives. Returns at once."""
        ...

    def last_words(self, name: str) -> str:
        """The last line that it wrote to its standard error; "" for none."""
        ...

    @property
    def pids(self) -> Mapping[str, int]:
        """The process of each, where known."""
        ...

    def close(self) -> None:
        """End all; afterwards none is left, not even as a zombie. A second call does nothing."""
        ...


class ProcessLauncher:
    """Runs `python -m module NAME PARENT_PID *arguments` on this machine.

    Args:
        module, arguments: what each runs; it is to call `child_process.end_with(PARENT_PID)`.
        threads: of each, for OpenMP and MKL.
        directory: for the logs (standard error), one file NAME.log each.
    """

    def __init__(self, module: str, arguments: Sequence[str], threads: int, directory: Path) -> None:
        self.where: str | None = None
        self._module = module
        self._arguments = tuple(arguments)
        self._threads = threads
        self._directory = directory
        self._children: dict[str, Child] = {}
        self._killed: set[str] = set()
        self._system_kills = system_kills()

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        """See `Launcher.start`."""
        with open(self._log(name), "wb") as log:
            self._children[name] = fork_module(
                self._module,
                [name, str(os.getpid()), *self._arguments],
                errors=log,
                environment={
                    "OMP_NUM_THREADS": str(self._threads),
                    "MKL_NUM_THREADS": str(self._threads),
                    **environment,
                },
            )

    def kill(self, name: str) -> None:
        """See `Launcher.kill`."""
        self._killed.add(name)
        kill_group(self._children[name])

    def exit_of(self, name: str) -> str | None:
        """See `Launcher.exit_of`."""
        how = exit_of(self._children[name])
        if how is not None and how.endswith("SIGKILL") and name not in self._killed:
            kills = system_kills() - self._system_kills
            how += f" ({_SHORT_OF_MEMORY})" if kills else ""
        return how

    def last_words(self, name: str) -> str:
        """See `Launcher.last_words`."""
        return last_line(self._log(name))

    @property
    def pids(self) -> dict[str, int]:
        """See `Launcher.pids`."""
        return {name: child.pid for name, child in self._children.items()}

    def close(self) -> None:
        """See `Launcher.close`."""
        end_all(self._children.values())

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def kill_group(child: Child) -> None:
    """SIGKILL a child that leads a process group, and all in it."""
    if child.returncode is None:  # until it is waited for, nobody else can have its number
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def exit_of(child: Child) -> str | None:
    """How a child that leads a process group ended; None while it lives. Whoever is left in its group is killed."""
    if child.returncode is None:
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        kill_group(child)
    status = child.wait()
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"


def end_all(children: Collection[Child]) -> None:
    """Kill children that lead process groups, and wait until none is left."""
    for child in children:
        kill_group(child)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the system; it will not come back from there
            child.wait(_END_TIMEOUT_S)


def last_line(log: Path) -> str:
    """The last line of a file that is not empty; "" where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""


def system_kills() -> int:
    """How many processes this machine has ended so far for lack of memory (Linux; elsewhere 0)."""
    try:
        with open("/proc/vmstat") as counts:
            return next((int(line.split()[1]) for line in counts if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
