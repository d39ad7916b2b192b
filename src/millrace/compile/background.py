"""Compile in a child process while this one trains."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO

from millrace.child_process import start_module
from millrace.compile.artifacts import cache_directory
from millrace.compile.eager import Compiled
from millrace.compile.inductor import compile_inductor, load_cached, one_line
from millrace.compile.threads import compilation_begins, compilation_ends, threads_for
from millrace.compile.worker import UNKNOWN_OPERATOR
from millrace.errors import CompileError, GraphError
from millrace.graph.graph import Graph
from millrace.graph.save import save_graph

_TIME_LIMIT_S = 1800.0
_running: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
_turn = threading.Lock()  # one compilation at a time: training wants the other cores, and a child takes a lot of memory


class BackgroundCompilation:
    """Starts at once; `result` is None until it is over, then the callable or the CompileError.

    A child process, because Inductor is Python and would take the interpreter away from training; and because a crash
    or a hang of a compiler must not be a crash or a hang of the run.
    """

    def __init__(self, graph: Graph) -> None:
        self.result: Compiled | CompileError | None = None
        self.seconds = 0.0
        self._graph = graph
        self._cancelled = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._threads = threads_for(graph)  # asked here: PyTorch's number of threads is each thread's own
        compilation_begins()
        self._thread = threading.Thread(target=self._work, name="millrace-compile", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> Compiled | CompileError | None:
        """Block until it is over or the time has passed."""
        self._thread.join(timeout_s)
        return self.result

    def cancel(self) -> None:
        """End it, if it is not over, without waiting for that."""
        self._cancelled.set()
        if (child := self._child) is not None:
            _kill(child)

    def _work(self) -> None:
        start = time.monotonic()
        try:
            result: Compiled | CompileError = load_cached(self._graph, self._threads) or self._compiled()
        except CompileError as error:
            result = error
        except Exception as error:
            result = CompileError(one_line(error))
        finally:
            compilation_ends()
        self.seconds = time.monotonic() - start
        self.result = result

    def _compiled(self) -> Compiled:
        with _turn:
            self._stop_if_cancelled()
            # While this one waited, another may have compiled the same.
            if load_cached(self._graph, self._threads) is None:
                self._compile_in_child()
            self._stop_if_cancelled()
            # The cache is filled, or only this process can compile it.
            return compile_inductor(self._graph, self._threads)

    def _stop_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CompileError("compilation was cancelled")

    def _compile_in_child(self) -> None:
        """Have a child fill the cache; it cannot where operators are registered in this process only.

        Raises: CompileError when the child says that it cannot be compiled at all.
        """
        with tempfile.TemporaryDirectory(prefix="millrace-compile-") as directory:
            graph_file, errors_file = Path(directory) / "step.graph", Path(directory) / "errors"
            try:
                save_graph(self._graph, graph_file)
            except GraphError:
                return
            # No pipe: the child's own children could hold it open after its end.
            with errors_file.open("wb") as errors:
                self._child = child = _start(graph_file, self._threads, errors)
            _running.add(child)
            try:
                self._stop_if_cancelled()
                child.wait(_TIME_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise CompileError(f"compilation took over {_TIME_LIMIT_S:.0f} s and was ended") from None
            finally:
                self._child = None
                _end(child)
                _running.discard(child)
            said = errors_file.read_text(errors="replace").strip().splitlines()
        if child.returncode < 0:
            raise CompileError(
                f"the compiling process was killed by signal {-child.returncode} "
                f"({signal.Signals(-child.returncode).name}); was there too little memory?"
            )
        if child.returncode not in (0, UNKNOWN_OPERATOR):
            raise CompileError(said[-1] if said else f"the compiling process ended with status {child.returncode}")


def _start(graph_file: Path, threads: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return start_module(
        "millrace.compile.worker",
        [str(graph_file), str(threads), str(os.getpid())],
        errors=errors,
        environment={"MILLRACE_CACHE": str(cache_directory().parent)},
    )


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and all its own children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _end(child: subprocess.Popen[bytes]) -> None:
    _kill(child)
    child.wait()


@atexit.register
def _end_all() -> None:
    for child in list(_running):
        _end(child)
