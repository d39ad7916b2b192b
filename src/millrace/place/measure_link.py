"""What a transfer takes between two processes of this host, and between its memory and a GPU."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import torch

_SIZE_BYTES = 2**25
_TRIPS, _COPIES = 300, 12


def measure_host_link() -> dict[str, float]:
    """Latency and rate of a copy into shared memory, a notification over a Unix socket, and a copy out of it."""
    ours, theirs = socket.socketpair()
    shared = SharedMemory(create=True, size=_SIZE_BYTES)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(ours, theirs, shared), daemon=True)
    child.start()
    theirs.close()
    ours.settimeout(30)
    source = np.ones(_SIZE_BYTES, np.uint8)
    try:
        trips_s = [_trip(ours, shared, source[:8]) for _ in range(_TRIPS)]
        copies_s = [_trip(ours, shared, source) for _ in range(_COPIES)]
    finally:
        ours.close()
        child.join(5)
        shared.close()
        shared.unlink()
    # A trip is a transfer and an empty answer.
    latency_s = statistics.median(trips_s) / 2
    return {"latency_s": latency_s, "bytes_per_s": _SIZE_BYTES / max(statistics.median(copies_s[2:]) - latency_s, 1e-9)}


def measure_cuda_link(device: str) -> dict[str, float]:
    """Latency and rate of what workers do to get a tensor to a GPU and back, one direction.

    There it is copied into shared memory, from there into a page-locked buffer, and then by the GPU.
    """
    seconds: dict[int, float] = {}
    for size in (8, _SIZE_BYTES):
        sent, slot = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        taken = []
        for _ in range(_COPIES):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            sent.copy_(buffer.copy_(slot.copy_(sent)).to(device, non_blocking=True))
            taken.append((time.perf_counter() - begin) / 2)
        seconds[size] = statistics.median(taken[2:])
    return {"latency_s": seconds[8], "bytes_per_s": _SIZE_BYTES / max(seconds[_SIZE_BYTES] - seconds[8], 1e-9)}


def _trip(connection: socket.socket, shared: SharedMemory, source: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> float:
    begin = time.perf_counter()
    np.ndarray((len(source),), np.uint8, buffer=shared.buf)[:] = source
    connection.sendall(len(source).to_bytes(8, "little"))
    if not connection.recv(1):
        raise OSError("the process at the other end of the link that is measured ended")
    return time.perf_counter() - begin


def _answer(theirs_of_parent: socket.socket, connection: socket.socket, shared: SharedMemory) -> None:
    theirs_of_parent.close()
    target = np.empty(_SIZE_BYTES, np.uint8)
    while size := connection.recv(8):
        count = int.from_bytes(size, "little")
        target[:count] = np.ndarray((count,), np.uint8, buffer=shared.buf)
        connection.sendall(b"k")
