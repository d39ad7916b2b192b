"""What a send/recv pair costs, for each transport: `python -m bench.transports`.

Two processes (two threads for "in_process") send a tensor to and fro; half of the time of a round trip is one pair. All
transports take turns, and with them two that do the least: gloo's own send and recv, and a copy into a shared region
whose reader spins on a flag. Prints a JSON line per transport and size: medians over the rounds, of the times and of
the ratios to those two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore, ProcessGroupGloo

from millrace.graph.signature import TensorSpec
from millrace.partition.program import Edge
from millrace.runtime.transport import gloo, in_process, shared_memory
from millrace.runtime.transport.base import Transport

DEVICES = ("/host:0/cpu:0", "/host:0/cpu:1")
SIZES_BYTES = (16, 1_000_000, 16_000_000, 100_000_000)
LIMIT_S = 60.0
TURN_S = 0.3  # about how long one transport's turn lasts
BARE_GLOO, BARE_COPY, IN_PROCESS, SHARED, GLOO = "bare gloo", "bare copy", "in_process", "shared_memory", "gloo"

PingPong = Callable[[int], None]  # so many round trips


def over_transport(transport: Transport, size_bytes: int, work: Callable[[], None] = lambda: None) -> PingPong:
    """Round trips over edges 0 (out) and 1 (back); the first process does some work before each."""
    tensor, first, step = torch.ones(size_bytes // 4), transport.device == DEVICES[0], 0

    def run(count: int) -> None:
        nonlocal step
        for _ in range(count):
            transport.begin_step(step)
            step += 1
            if first:
                work()
                transport.send(0, tensor)
                transport.recv(1, LIMIT_S)
            else:
                transport.send(1, transport.recv(0, LIMIT_S))

    return run


def over_bare_gloo(rank: int, size_bytes: int, place: Path) -> PingPong:
    """Round trips with gloo's own send and recv."""
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
    options._timeout = datetime.timedelta(seconds=LIMIT_S)
    group = ProcessGroupGloo(FileStore(str(place / "bare-gloo"), 2), rank, 2, options)
    out, back = torch.ones(size_bytes // 4), torch.empty(size_bytes // 4)

    def send() -> None:
        group.send([out], 1 - rank, 0).wait()

    def recv() -> None:
        group.recv([back], 1 - rank, 0).wait()

    def run(count: int) -> None:
        for _ in range(count):
            for act in (send, recv) if rank == 0 else (recv, send):
                act()

    return run


def over_bare_copy(rank: int, size_bytes: int, place: Path) -> PingPong:
    """Round trips with a copy into shared memory and a flag that the other spins on."""
    path, total_bytes = place / "bare-copy", 128 + 2 * size_bytes
    with path.open("a+b") as file:
        file.truncate(total_bytes)
        memory = mmap.mmap(file.fileno(), total_bytes)
    flags = memoryview(memory)[:128].cast("Q")
    whole = torch.frombuffer(memory, dtype=torch.uint8)[128:]
    slot = whole[rank * size_bytes : (rank + 1) * size_bytes].view(torch.float32)
    tensor, sent = torch.ones(size_bytes // 4), 0

    def run(count: int) -> None:
        nonlocal sent
        for _ in range(count):
            sent += 1
            if rank == 0:
                slot.copy_(tensor)
                flags[0] = sent
            while flags[8 * (1 - rank)] != sent:
                pass
            if rank == 1:
                slot.copy_(tensor)
                flags[8] = sent

    return run


def prepare(kind: str, rank: int, size_bytes: int, place: Path) -> PingPong:
    """This process's part for one transport and size. A number after "shared_memory" is its spin in microseconds."""
    place.mkdir(mode=0o700, exist_ok=True)
    if kind == BARE_GLOO:
        return over_bare_gloo(rank, size_bytes, place)
    if kind == BARE_COPY:
        return over_bare_copy(rank, size_bytes, place)
    edges = _edges(size_bytes)
    if kind == GLOO:
        return over_transport(gloo.connect(DEVICES[rank], DEVICES, edges, place / "store", LIMIT_S), size_bytes)
    if kind == IN_PROCESS:
        return two_threads(edges, size_bytes)
    _, _, spin_us = kind.partition(" ")
    spin_s = float(spin_us) * 1e-6 if spin_us else shared_memory.SPIN_S
    transport = shared_memory.connect(DEVICES[rank], edges, place, LIMIT_S, spin_s)
    return over_transport(transport, size_bytes)


def _edges(size_bytes: int) -> list[Edge]:
    spec = TensorSpec((size_bytes // 4,), torch.float32)
    return [Edge(0, DEVICES[0], DEVICES[1], "ping", spec), Edge(1, DEVICES[1], DEVICES[0], "pong", spec)]


def two_threads(edges: Sequence[Edge], size_bytes: int) -> PingPong:
    """Both sides here, a thread each."""
    sides = [over_transport(t, size_bytes) for t in in_process.connect(DEVICES, edges).values()]

    def run(count: int) -> None:
        other = threading.Thread(target=sides[1], args=(count,))
        other.start()
        sides[0](count)
        other.join()

    return run


class Partner:
    """The other process, which does what the first one tells it to: a line for each turn."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.transports", "--partner"]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def tell(self, **turn: Any) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps(turn) + "\n")
        self._program.stdin.flush()

    def end(self) -> None:
        self._program.communicate()


def be_partner() -> None:
    """Follow the lines of the first process."""
    ready: dict[tuple[str, int], PingPong] = {}
    for line in sys.stdin:
        turn = json.loads(line)
        key = (turn["kind"], turn["size_bytes"])
        if "place" in turn:
            ready = {key: prepare(key[0], 1, key[1], Path(turn["place"]))} | {
                k: v for k, v in ready.items() if k[1] == key[1]
            }
        else:
            ready[key](turn["count"])


def measure(
    kinds: Sequence[str], size_bytes: int, rounds: int, partner: Partner, place: Path
) -> dict[str, list[float]]:
    """Seconds of a pair, by transport, one for each round."""
    parts = {}
    for kind in kinds:
        here = place / f"{kind}-{size_bytes}".replace(" ", "-")
        if kind != IN_PROCESS:
            partner.tell(kind=kind, size_bytes=size_bytes, place=str(here))
        parts[kind] = prepare(kind, 0, size_bytes, here)

    def turn(kind: str, count: int) -> float:
        if kind != IN_PROCESS:
            partner.tell(kind=kind, size_bytes=size_bytes, count=count + 1)
        parts[kind](1)  # both are awake then
        if kind == IN_PROCESS:
            parts[kind](1)
        start_s = time.perf_counter()
        parts[kind](count)
        return (time.perf_counter() - start_s) / count / 2

    counts = {}
    for kind in kinds:
        turn(kind, 2)
        counts[kind] = max(2, min(3000, round(TURN_S / 2 / turn(kind, 5))))
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(turn(kind, counts[kind]))
    return found


def one_core(spins_us: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    """Both processes on one processor: how long a step takes in which one computes for about a millisecond.

    The other one waits for it meanwhile, looking so many microseconds before it sleeps.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

    def work() -> None:
        for _ in range(20_000):
            pass

    partner, steps, sides = Partner(), 200, {}
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as place:
        for spin_us in spins_us:
            kind, here = f"{SHARED} {spin_us:g}", Path(place) / f"{spin_us:g}"
            here.mkdir(mode=0o700)
            partner.tell(kind=kind, size_bytes=16, place=str(here))
            transport = shared_memory.connect(DEVICES[0], _edges(16), here, LIMIT_S, spin_us * 1e-6)
            sides[kind] = over_transport(transport, 16, work)
        found: dict[str, list[float]] = {kind: [] for kind in sides}
        for _ in range(rounds):
            for kind, side in sides.items():
                work_s = _seconds(lambda: [work() for _ in range(steps)])
                partner.tell(kind=kind, size_bytes=16, count=steps)
                step_s = _seconds(lambda side=side: side(steps))
                found[kind].append((step_s - work_s) / steps)
    partner.end()
    return [
        {"name": f"transport/one core/{kind}", "added_us": round(statistics.median(times) * 1e6, 1), "rounds": rounds}
        for kind, times in found.items()
    ]


def _seconds(do: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    do()
    return time.perf_counter() - start_s


def figures(found: dict[str, list[float]], size_bytes: int) -> list[dict[str, Any]]:
    """A figure for each transport. A ratio above 1 says that it takes longer than the bare one."""

    def ratio(kind: str, bare: str) -> float:
        pairs = zip(found[kind], found[bare], strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 3)

    def figure(kind: str) -> dict[str, Any]:
        pair_s = statistics.median(found[kind])
        speed = {} if size_bytes < 1_000_000 else {"gb_per_s": round(size_bytes / pair_s / 1e9, 2)}
        return {
            "name": f"transport/{kind}/{size_bytes}",
            "pair_us": round(pair_s * 1e6, 1),
            **speed,
            "times_bare_gloo": ratio(kind, BARE_GLOO),
            "times_bare_copy": ratio(kind, BARE_COPY),
            "rounds": len(found[kind]),
        }

    return [figure(kind) for kind in found]


def main() -> None:
    """Measure everything, or what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.transports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_BYTES, help="bytes, multiples of 4")
    parser.add_argument("--spin-us", type=float, nargs="*", default=(), help="more spins for shared memory to try")
    parser.add_argument("--one-core", action="store_true", help="only: what a spinning receiver takes from a busy one")
    parser.add_argument("--partner", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.partner:
        be_partner()
        return
    if asked.one_core:
        for figure in one_core((0.0, shared_memory.SPIN_S * 1e6, *asked.spin_us), asked.rounds):
            print(json.dumps(figure), flush=True)
        return
    kinds = [BARE_GLOO, BARE_COPY, IN_PROCESS, SHARED, *(f"{SHARED} {spin:g}" for spin in asked.spin_us), GLOO]
    partner = Partner()
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as place:
        for size_bytes in asked.sizes:
            for figure in figures(measure(kinds, size_bytes, asked.rounds, partner, Path(place)), size_bytes):
                print(json.dumps(figure), flush=True)
    partner.end()


if __name__ == "__main__":
    main()
