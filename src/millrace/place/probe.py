"""The devices of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch

from millrace.errors import PlacementError, did_you_mean
from millrace.place.calibrate import (
    BUDGET_S,
    Figures,
    Say,
    cpu_figures,
    cuda_figures,
    cuda_link_figures,
    host_link_figures,
)
from millrace.place.cluster import Cluster, Device, Link

log = logging.getLogger(__name__)

ALL = "all"
Wanted = int | str | Sequence[int] | Sequence[str] | None
_HOST = "/host:0/"


def local_cluster(
    devices: Wanted = None, *, measure_again: bool = False, budget_s: float = BUDGET_S, say: Say = log.info
) -> Cluster:
    """The devices of this machine with measured rates, which are kept for the next call.

    CPU workers share the machine's memory, and the cores, of which one is left to the worker of each GPU.

    Args:
        devices: "all" or None: every GPU, and one CPU worker. A number: so many CPU workers. A sequence of numbers: a
            CPU worker for each of these numbers of threads; memory in proportion. A sequence of names: see
            `named_devices`.
        measure_again: also where figures were kept. budget_s: for each device that is measured. say: is told
            what is measured, as that takes some seconds.

    Raises: PlacementError when no device is asked for, one that is not there, or one without a thread; when measuring
        fails.
    """
    threads, gpus = chosen_devices(devices, len(os.sched_getaffinity(0)), torch.cuda.device_count())
    counts = list(threads.values())
    figures = {t: cpu_figures(t, measure_again=measure_again, budget_s=budget_s, say=say) for t in sorted(set(counts))}
    busy = figures
    if len(counts) > 1:
        others = {t: [*counts[: counts.index(t)], *counts[counts.index(t) + 1 :]] for t in figures}
        busy = {t: cpu_figures(t, others[t], measure_again=measure_again, budget_s=budget_s, say=say) for t in figures}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [
        _device(name, "cpu", memory_bytes * count // sum(counts), figures[count], count, busy[count])
        for name, count in threads.items()
    ]
    ways: dict[str, Mapping[str, float]] = {}
    for name in gpus:
        cuda = f"cuda:{name.rpartition(':')[2]}"
        total_bytes = torch.cuda.get_device_properties(cuda).total_memory
        measured = cuda_figures(cuda, measure_again=measure_again, budget_s=budget_s, say=say)
        found.append(_device(name, "cuda", total_bytes, measured, 1))
        ways[name] = cuda_link_figures(cuda, measure_again=measure_again, say=say)
    host = host_link_figures(measure_again=measure_again, say=say) if len(threads) > 1 else None
    return Cluster(tuple(found), local_links(ways, host))


def chosen_devices(devices: Wanted, cores: int, gpus: int) -> tuple[dict[str, int], list[str]]:
    """What `devices` means on a machine with so many cores and GPUs.

    Returns: CPU worker -> its threads, and the GPUs, by their whole names.
    Raises: PlacementError.
    """
    if devices in (None, ALL, [ALL]):
        devices = ["gpu", "cpu"] if gpus else ["cpu"]
    if isinstance(devices, str):
        devices = [devices]
    names = [] if isinstance(devices, int) else [each for each in devices if isinstance(each, str)]
    if names and not isinstance(devices, int) and len(names) == len(devices):
        cpu_names, gpu_names = named_devices(names, gpus)
        each_threads = max(1, (cores - len(gpu_names)) // max(1, len(cpu_names)))
        return dict.fromkeys(cpu_names, each_threads), gpu_names
    if isinstance(devices, int):
        threads = [max(1, cores // devices)] * devices if devices > 0 else []
    else:
        threads = [each for each in devices if isinstance(each, int)]
    if not threads or names or min(threads) < 1:
        raise PlacementError(
            f"devices: expected how many CPU workers there are to be, a list with the threads of each, all of them at "
            f'least 1, names such as ["gpu:0", "cpu:0"], or "{ALL}"; got {devices!r}.'
        )
    return {f"{_HOST}cpu:{index}": count for index, count in enumerate(threads)}, []


def named_devices(names: Sequence[str], gpus: int) -> tuple[list[str], list[str]]:
    """CPU workers and GPUs by their whole names, in the order of `names`.

    Args:
        names: "gpu:1" is a GPU as PyTorch counts them, "cpu:0" a CPU worker, each also with "/host:0/" before it; "gpu"
            stands for every GPU, "cpu" for one CPU worker.
        gpus: how many there are.

    Raises: PlacementError for one that is not there, is named twice, or is of another host.
    """
    there = [f"gpu:{index}" for index in range(gpus)]
    wanted: list[str] = []
    for name in names:
        short = name.removeprefix(_HOST)
        wanted += there if short == "gpu" and there else ["cpu:0"] if short == "cpu" else [short]
    for short in wanted:
        kind, _, index = short.partition(":")
        if short not in there and not (kind == "cpu" and index.isdecimal()):
            seen = ", ".join(there) or "no GPU that PyTorch can use"
            raise PlacementError(
                f"devices={list(names)!r}: this machine has no {short!r}. It has {seen}, and as many CPU workers "
                f"(cpu:0, cpu:1, …) as you like. {did_you_mean(short, [*there, 'gpu', 'cpu', 'cpu:0'])}"
            )
        if wanted.count(short) > 1:
            raise PlacementError(f"devices={list(names)!r} names {short} twice. Every device is one worker.")
    whole = [_HOST + short for short in wanted]
    return [name for name in whole if "/cpu:" in name], [name for name in whole if "/gpu:" in name]


def local_links(ways: Mapping[str, Mapping[str, float]], host: Mapping[str, float] | None) -> tuple[Link, ...]:
    """The links of one machine. Tensors go from one GPU to another through the host's memory.

    Args: ways: GPU -> "latency_s" and "bytes_per_s" between it and host memory. host: the same between two CPU workers.
    """
    links = [
        Link(one, other, a["latency_s"] + b["latency_s"], 1.0 / (1.0 / a["bytes_per_s"] + 1.0 / b["bytes_per_s"]))
        for one, a in ways.items()
        for other, b in ways.items()
        if one != other
    ]
    for name, way in ways.items():
        latency_s, bytes_per_s = way["latency_s"], way["bytes_per_s"]
        links += [Link(name, "*", latency_s, bytes_per_s), Link("*", name, latency_s, bytes_per_s)]
    if host is not None:
        links.append(Link(f"{_HOST}cpu:*", f"{_HOST}cpu:*", host["latency_s"], host["bytes_per_s"], sender_copies=True))
    return tuple(links)


def _device(
    name: str, kind: str, memory_bytes: int, figures: Figures, threads: int, busy: Figures | None = None
) -> Device:
    rates = {key: value for key, value in figures.items() if key != "dispatch_s"}
    lower = {key: min(busy[key], value) for key, value in rates.items()} if busy not in (None, figures) else {}
    return Device(name, kind, memory_bytes, rates, figures["dispatch_s"], threads, lower)
