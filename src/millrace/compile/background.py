"""Compile in a child process while this one trains."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import torch

from millrace.compile.eager import Compiled
from millrace.compile.inductor import compile_inductor, is_cached
from millrace.compile.worker import UNKNOWN_OPERATOR
from millrace.errors import CompileError
from millrace.graph.graph import Graph
from millrace.graph.save import save_graph

_TIME_LIMIT_S = 1800.0
_running: weakref.WeakSet[subprocess.Popen[str]] = weakref.WeakSet()


class BackgroundCompilation:
    """Starts at once; `result` is None until it is over, then the callable or the CompileError.

    A child process, because Inductor is Python and would take the interpreter away from training; and because a crash
    or a hang of a compiler must not be a crash or a hang of the run.
    """

    def __init__(self, graph: Graph) -> None:
        self.result: Compiled | CompileError | None = None
        self.seconds = 0.0
        self._graph = graph
        self._thread = threading.Thread(target=self._work, name="millrace-compile", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> Compiled | CompileError | None:
        """Block until it is over or the time has passed."""
        self._thread.join(timeout_s)
        return self.result

    def _work(self) -> None:
        start = time.monotonic()
        try:
            in_child = is_cached(self._graph) or _compile_in_child(self._graph)
            del in_child  # either way the next call finds the cache filled, or compiles here
            result: Compiled | CompileError = compile_inductor(self._graph)
        except CompileError as error:
            result = error
        except Exception as error:
            result = CompileError(f"{type(error).__name__}: {error}")
        self.seconds = time.monotonic() - start
        self.result = result


def _compile_in_child(graph: Graph) -> bool:
    """Whether the child filled the cache; False when only this process can (its operators are registered here).

    Raises: CompileError when the child says that it cannot be compiled at all.
    """
    with tempfile.TemporaryDirectory(prefix="millrace-compile-") as directory:
        graph_file = Path(directory) / "step.graph"
        save_graph(graph, graph_file)
        worker = [sys.executable, "-m", "millrace.compile.worker"]
        command = [*worker, str(graph_file), str(torch.get_num_threads()), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run; Inductor's own children end with the group
        )
        _running.add(child)
        try:
            _, errors = child.communicate(timeout=_TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            _end(child)
            raise CompileError(f"compilation took over {_TIME_LIMIT_S:.0f} s and was ended") from None
        finally:
            _running.discard(child)
    if child.returncode == 0:
        return True
    if child.returncode == UNKNOWN_OPERATOR:
        return False
    last = (errors.strip() or f"exit status {child.returncode}").splitlines()[-1]
    raise CompileError(last)


def _end(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@atexit.register
def _end_all() -> None:
    for child in list(_running):
        _end(child)
