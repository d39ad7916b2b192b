"""What a Ray actor does for a process of ours: it starts it as its child, waits for its end, and kills it when told.

It travels to the actor as it is, with the functions it uses, so that actors import neither millrace nor PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from millrace.child_process import start_module
from millrace.runtime.launch import exit_of, kill_group, last_line


class Keeper:
    """One process, which ends with this one. Its methods run in threads of their own."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._started = threading.Event()
        self._lock = threading.Lock()

    def run(self, module: str, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str]:
        """Run `python -m module NAME PARENT_PID *arguments` to its end.

        It finds a directory of its own in the environment as MILLRACE_SCRATCH, which is removed with it.

        Returns: how it ended, and the last line of its standard error.
        """
        # In that of a Ray that a driver has started for itself, it goes with that, also when all is killed.
        with tempfile.TemporaryDirectory(prefix="millrace-", dir=os.environ.get("RAY_TMPDIR")) as directory:
            log = Path(directory, f"{name}.log")
            with self._lock, open(log, "wb") as errors:
                child = self._child = start_module(
                    module,
                    [name, str(os.getpid()), *arguments],
                    errors=errors,
                    environment={**environment, "MILLRACE_SCRATCH": directory},
                )
                if self._killed:
                    kill_group(child)
            self._started.set()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:  # no number is freed while somebody kills by it
                how = exit_of(child)
            assert how is not None
            return how, last_line(log)

    def pid(self) -> int:
        """The process, once it has started."""
        self._started.wait()
        assert self._child is not None
        return self._child.pid

    def kill(self) -> None:
        """Kill it, also if it is only about to start."""
        with self._lock:
            self._killed = True
            if self._child is not None:
                kill_group(self._child)
