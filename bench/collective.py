"""All-reduce of 100 MB between processes of one host, against bare gloo: `python -m bench.collective`.

Bare gloo adds up one flat tensor, and so do the groups of `millrace.replicas`: "one" is one tensor, "mixture" 60
tensors as in a transformer. "weighed": they are multiplied by the rank's weight, too. All take turns; a time is the
longest of all ranks'; the ratio is the median over the rounds of time / bare gloo's time in the same round. Prints one
JSON line per figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from millrace.replicas.collective import Group
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.rendezvous import Rendezvous, StoreAddress
from millrace.replicas.shared_group import CHUNK_BYTES, SharedGroup

BARE = "bare gloo"
ELEMENTS = 25_000_000
LAYERS = 10
LAYER = (1_228_800, 1_920, 409_600, 640, 640, 858_400)  # attention and its norm, feed-forward
TIMEOUT_S = 120.0


def tensors(lengths: list[int]) -> list[Tensor]:
    return [torch.full((length,), 1e-30) for length in lengths]  # it grows by the number of ranks in every round


def bare_gloo(address: StoreAddress, rank: int, size: int) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
    options._timeout = datetime.timedelta(seconds=TIMEOUT_S)
    return ProcessGroupGloo(address.connect(0, TIMEOUT_S), rank, size, options)


def be_rank(address: StoreAddress, rank: int, size: int, rounds: int, chunks: list[int]) -> None:
    """Take part in all rounds, and print this rank's times, in seconds, by name."""
    bare = bare_gloo(address, rank, size)
    flat = torch.ones(ELEMENTS)

    def group(number: int, kind: type[GlooGroup] | type[SharedGroup], **more: object) -> Group:
        return kind(address, number, rank, size, abandoned=lambda: False, timeout_s=TIMEOUT_S, **more)  # type: ignore[arg-type]

    groups = {"gloo": group(1, GlooGroup), "gloo, bfloat16": group(2, GlooGroup, wire="bfloat16")}
    for number, chunk_bytes in enumerate(chunks):
        name = "shared memory" if chunk_bytes == CHUNK_BYTES else f"shared memory {chunk_bytes >> 10} KiB"
        groups[name] = group(3 + number, SharedGroup, chunk_bytes=chunk_bytes)
    kinds: dict[str, Callable[[], object]] = {BARE: lambda: bare.allreduce([flat]).wait()}
    for name, own in groups.items():
        for shape, lengths, weight in (
            ("one", [ELEMENTS], 1.0),
            ("mixture", list(LAYER) * LAYERS, 1.0),
            ("mixture, weighed", list(LAYER) * LAYERS, 1 / size),
        ):
            kinds[f"{name}, {shape}"] = _reducing(own, tensors(lengths), weight)
    times_s: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, reduce in kinds.items():
            flat.fill_(1.0)
            bare.barrier().wait()
            start_s = time.perf_counter()
            reduce()
            if number:  # the first warms up
                times_s[name].append(time.perf_counter() - start_s)
    print(json.dumps(times_s), flush=True)


def _reducing(group: Group, own: list[Tensor], weight: float) -> Callable[[], object]:
    return lambda: group.all_reduce(own, weight)


def measure(size: int, rounds: int, chunks: list[int]) -> dict[str, list[float]]:
    """Seconds of each round, of the slowest rank, by name."""
    rendezvous = Rendezvous()
    where = rendezvous.address
    task = [where.host, str(where.port), where.secret, "--rounds", str(rounds), "--chunks", *map(str, chunks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.collective", "--rank", str(rank), str(size), *task], stdout=subprocess.PIPE
        )
        for rank in range(size)
    ]
    try:
        said = [json.loads(process.communicate(timeout=600)[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        rendezvous.close()
    return {name: [max(times) for times in zip(*(own[name] for own in said), strict=True)] for name in said[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--chunks", type=int, nargs="+", default=[CHUNK_BYTES], help="bytes, for shared memory")
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.rank:
        rank, size, host, port, secret = asked.rank
        be_rank(StoreAddress(host, int(port), secret), int(rank), int(size), asked.rounds, asked.chunks)
        return
    for size in asked.sizes:
        times_s = measure(size, asked.rounds, asked.chunks)
        for name, own in times_s.items():
            ratios = sorted(time_s / bare_s for time_s, bare_s in zip(own, times_s[BARE], strict=True))
            figure = {
                "what": name,
                "processes": size,
                "median_ms": round(statistics.median(own) * 1e3, 1),
                "least_ms": round(min(own) * 1e3, 1),
                "ratio_to_bare_gloo": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
