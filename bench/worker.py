"""The driver's side of a measurement: worker processes, started, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.catalogue import PeerSpec

_ROOT = Path(__file__).resolve().parent.parent
_LEAVE_S = 5.0  # for a worker to end by itself, and to end the compilers that it started


class PeerError(Exception):
    """A worker ended, kept silent for too long or answered nonsense; the message ends in what it last said."""


class Worker:
    """One peer in its own process. Use as a context manager, or `close` it."""

    def __init__(self, spec: PeerSpec, task: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.spec = spec
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [*spec.command, json.dumps({**task, "options": dict(spec.options)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            cwd=_ROOT,
            start_new_session=True,  # its own children, a compiler's, end with it
        )
        self._pending = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(question) + "\n").encode())
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(self._story("ended")) from error
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next line the worker says. Raises PeerError when none comes within `limit_s`."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(limit_s):
                    raise PeerError(self._story(f"did not answer within {limit_s:.0f} s"))
                data = os.read(descriptor, 1 << 16)
                if not data:
                    raise PeerError(self._story("ended"))
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process and whatever it started; first by asking."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _story(self, what: str) -> str:
        self._errors.seek(0)
        last = [line for line in self._errors.read().splitlines() if line.strip()][-1:]
        return f"{self.spec.title} {what}" + (f": {last[0].strip()[:300]}" if last else "")


def worker_environment(threads: int, cache: Path) -> dict[str, str]:
    """Environment variables that give every framework the same threads, this project's modules, and caches in `cache`.

    The user's own caches stay untouched, and what is in them changes no figure.
    """
    paths = [str(_ROOT), str(_ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MILLRACE_CACHE": str(cache / "millrace"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # peers share the device
    }
