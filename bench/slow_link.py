"""What members import to look as if they were on hosts of their own, with a slow link between servers and workers.

Tensors travel by TCP, as between hosts, and whoever sends any sleeps first for as long as a link of BENCH_GBIT gigabits
a second would take. So it shows what waiting costs, and nothing of what real networks do beside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from millrace.replicas.server_link import Link
from millrace.runtime.launch import ProcessLauncher

_GBIT = "BENCH_GBIT"
_send = Link.send_tensors


class SlowLauncher(ProcessLauncher):
    """Members that can be reached by TCP alone."""

    def __init__(self, directory: Path, gbit: float) -> None:
        super().__init__("millrace.replicas.member", ["--imports", "bench.slow_link"], 1, directory)
        self.where = "tcp:127.0.0.1:0"
        self._scratch, self._gbit = directory, gbit

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        """See `Launcher.start`."""
        own = self._scratch / f"host-of-{name}"
        own.mkdir()
        elsewhere = {
            "MILLRACE_DIRECTORY": "/nonexistent/millrace",
            "MILLRACE_SCRATCH": str(own),
            _GBIT: str(self._gbit),
        }
        super().start(name, {**environment, **elsewhere})


def _send_slowly(link: Link, tensors: Iterable[Tensor], timeout_s: float) -> None:
    given = list(tensors)
    time.sleep(sum(tensor.nbytes for tensor in given) * 8 / (float(os.environ[_GBIT]) * 1e9))
    _send(link, given, timeout_s)


if _GBIT in os.environ:  # not where a launcher is made
    Link.send_tensors = _send_slowly  # type: ignore[method-assign]
