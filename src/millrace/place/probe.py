"""The devices of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from millrace.errors import PlacementError
from millrace.place.calibrate import BUDGET_S, Figures, cpu_figures, cuda_figures, cuda_link_figures, host_link_figures
from millrace.place.cluster import Cluster, Device, Link


def local_cluster(
    devices: int | Sequence[int] | None = None, *, measure_again: bool = False, budget_s: float = BUDGET_S
) -> Cluster:
    """The devices of this machine with measured rates, which are kept for the next call.

    Args:
        devices: None: the GPUs, and one CPU worker with all cores. A number: so many CPU workers that share the cores
            and the memory. A sequence: a CPU worker for each of these numbers of threads; memory in proportion.
        measure_again: also where figures were kept. budget_s: for each device that is measured.

    Raises: PlacementError when no device is asked for, or one without a thread; when measuring fails.
    """
    cores = len(os.sched_getaffinity(0))
    threads = [cores] if devices is None else _threads(devices, cores)
    figures = {t: cpu_figures(t, measure_again=measure_again, budget_s=budget_s) for t in sorted(set(threads))}
    busy = figures
    if len(threads) > 1:
        others = {t: [*threads[: threads.index(t)], *threads[threads.index(t) + 1 :]] for t in figures}
        busy = {t: cpu_figures(t, others[t], measure_again=measure_again, budget_s=budget_s) for t in figures}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [
        _device(f"/host:0/cpu:{index}", "cpu", memory_bytes * count // sum(threads), figures[count], count, busy[count])
        for index, count in enumerate(threads)
    ]
    links: list[Link] = []
    if devices is None:
        for index in range(torch.cuda.device_count()):
            device, name = f"cuda:{index}", f"/host:0/gpu:{index}"
            total_bytes = torch.cuda.get_device_properties(index).total_memory
            measured = cuda_figures(device, measure_again=measure_again, budget_s=budget_s)
            found.append(_device(name, "cuda", total_bytes, measured, 1))
            link = cuda_link_figures(device, measure_again=measure_again)
            latency_s, bytes_per_s = link["latency_s"], link["bytes_per_s"]
            links += [Link(name, "*", latency_s, bytes_per_s), Link("*", name, latency_s, bytes_per_s)]
    if len(threads) > 1:
        host = host_link_figures(measure_again=measure_again)
        links.append(Link("/host:0/cpu:*", "/host:0/cpu:*", host["latency_s"], host["bytes_per_s"]))
    return Cluster(tuple(found), tuple(links))


def _threads(devices: int | Sequence[int], cores: int) -> list[int]:
    threads = [max(1, cores // devices)] * devices if isinstance(devices, int) and devices > 0 else devices
    if isinstance(threads, int) or not threads or any(t < 1 for t in threads):
        raise PlacementError(
            f"devices: expected how many CPU workers there are to be, or a list with the threads of each, all of them "
            f"at least 1; got {devices!r}."
        )
    return list(threads)


def _device(
    name: str, kind: str, memory_bytes: int, figures: Figures, threads: int, busy: Figures | None = None
) -> Device:
    rates = {key: value for key, value in figures.items() if key != "dispatch_s"}
    lower = {key: min(busy[key], value) for key, value in rates.items()} if busy not in (None, figures) else {}
    return Device(name, kind, memory_bytes, rates, figures["dispatch_s"], threads, lower)
