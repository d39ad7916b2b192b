"""The measured rates of this machine, kept in the user's cache directory so that they are measured once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from millrace.child_process import start_module
from millrace.errors import PlacementError
from millrace.files import replace_bytes, user_cache
from millrace.place.cluster import CLASSES, PRODUCT, SPECIAL
from millrace.place.measure import measure_device
from millrace.place.measure_link import measure_cuda_link, measure_host_link

log = logging.getLogger(__name__)

BUDGET_S = 4.0  # for the rates of one device
_VERSION = 4
_DEVICE_KEYS = {*CLASSES, SPECIAL, f"{PRODUCT}.bfloat16", "dispatch_s"}
_LINK_KEYS = {"latency_s", "bytes_per_s"}
Figures = dict[str, float]
Say = Callable[[str], object]


def cpu_figures(
    threads: int,
    beside: Sequence[int] = (),
    *,
    measure_again: bool = False,
    budget_s: float = BUDGET_S,
    say: Say = log.info,
) -> Figures:
    """Rates by class, and "dispatch_s", of a worker process with so many threads.

    Args: beside: the threads of other workers that compute meanwhile. say: is told before something is measured.

    Raises: PlacementError when a process that measures fails.
    """
    others = "".join(f" beside {count}" for count in sorted(beside))
    measure = lambda: _measure(threads, beside, budget_s)  # noqa: E731
    return _kept(f"cpu {threads}{others}", _DEVICE_KEYS, measure, measure_again, say)


def cuda_figures(
    device: str, *, measure_again: bool = False, budget_s: float = BUDGET_S, say: Say = log.info
) -> Figures:
    """The same of a GPU, "cuda:0", measured in this process."""
    key = f"{device} {torch.cuda.get_device_name(device)}"
    return _kept(key, _DEVICE_KEYS, lambda: measure_device(device, budget_s), measure_again, say)


def host_link_figures(*, measure_again: bool = False, say: Say = log.info) -> Figures:
    """Latency and rate ("latency_s", "bytes_per_s") between two processes of this machine."""
    return _kept("link host", _LINK_KEYS, measure_host_link, measure_again, say)


def cuda_link_figures(device: str, *, measure_again: bool = False, say: Say = log.info) -> Figures:
    """Latency and rate ("latency_s", "bytes_per_s") between the worker of a GPU and another one's memory."""
    key = f"path {device} {torch.cuda.get_device_name(device)}"
    return _kept(key, _LINK_KEYS, lambda: measure_cuda_link(device), measure_again, say)


def calibration_path() -> Path:
    """Where this machine's figures are or would be."""
    machine = "\n".join([_processor(), str(os.cpu_count()), str(torch.__version__)])
    return user_cache() / f"calibration-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _kept(key: str, keys: set[str], measure: Callable[[], Figures], again: bool, say: Say) -> Figures:
    path = calibration_path()
    found = _read(path)
    if not again and _valid(found.get(key), keys):
        return dict(found[key])
    say(f"measuring this machine, once: {key}")
    figures = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_bytes(path, json.dumps({"version": _VERSION, **_read(path), key: figures}, indent=1).encode())
    except OSError as error:
        log.warning("the figures of this machine cannot be kept in %s (%s): the next start measures again", path, error)
    return figures


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("version") == _VERSION:
            return found
    return {}


def _valid(figures: object, keys: set[str]) -> bool:
    return (
        isinstance(figures, dict)
        and keys <= figures.keys()
        and all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in figures.values())
    )


def _measure(threads: int, beside: Sequence[int], budget_s: float) -> Figures:
    """All workers measure at once, which keeps all of them busy; the mean over those that are alike."""
    workers = [threads, *beside]
    with ThreadPoolExecutor(len(workers)) as pool:
        measured = list(pool.map(lambda count: _measure_worker(count, budget_s), workers))
    alike = [figures for count, figures in zip(workers, measured, strict=True) if count == threads]
    return {name: sum(one[name] for one in alike) / len(alike) for name in alike[0]}


def _measure_worker(threads: int, budget_s: float) -> Figures:
    reader, writer = os.pipe()
    environment = {"OMP_NUM_THREADS": str(threads)}
    arguments = [str(threads), str(budget_s), str(writer), str(os.getpid())]
    child = start_module(
        "millrace.place.measure", arguments, errors=subprocess.PIPE, environment=environment, descriptors=[writer]
    )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        content = pipe.read()
    _, errors = child.communicate()
    if child.returncode != 0:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise PlacementError(
            f"measuring a CPU worker ({threads} threads) ended with status {child.returncode}: {last}. "
            "Give the rates in a cluster file instead."
        )
    measured: Figures = json.loads(content)
    return measured


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
