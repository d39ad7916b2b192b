"""Ranks of a group, for tests: processes that read a JSON object per line, and answer each with one.

    {"call": NAME, …} → {"answer": …} or {"error": …, "message": …, "seconds": …}

The program itself forks them, one for each path of a Unix socket that it reads, so that torch is imported only once.

What the ranks reduce follows from a seed, so that nothing but the seed has to be told. {"abandon": true} is heard at
any time, also while a call waits: it is what the group's `abandoned` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from millrace.errors import MillraceError
from millrace.replicas.collective import Group, Handle
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.shared_group import SharedGroup

Shapes = Sequence[tuple[int, ...]]
KINDS: dict[str, Any] = {"gloo": GlooGroup, "shared": SharedGroup}
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (5, 3), (129,), (70, 130), (64, 3, 3, 3), (300, 401))
_BYTES_ACKED_AT = 120  # in Linux's struct tcp_info
LARGE = (*SHAPES, (751, 701), (20,))


def gradients(seed: int, rank: int, dtype: torch.dtype, shapes: Shapes = SHAPES) -> list[Tensor]:
    """A rank's tensors; every third has strides of its own, other ones on other ranks."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    made = []
    for number, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if (number + rank) % 3 == 0 and values.dim() >= 2:
            values = values.transpose(0, 1).contiguous().transpose(0, 1)
        made.append(values)
    return made


def weights(size: int, even: bool) -> list[float]:
    shares = [1] * size if even else [3 * rank + 1 for rank in range(size)]
    return [share / sum(shares) for share in shares]


def expected(seed: int, size: int, even: bool, dtype: torch.dtype, shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
    """The plain sums, in float64, and the sums of the absolute values of what is added up."""
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    magnitudes = [torch.zeros_like(values) for values in sums]
    for rank, weight in enumerate(weights(size, even)):
        for number, values in enumerate(gradients(seed, rank, dtype, shapes)):
            sums[number] += weight * values.double()
            magnitudes[number] += weight * values.double().abs()
    return sums, magnitudes


def digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Rank:
    """Answers the calls that a test makes."""

    def __init__(self) -> None:
        self.group: Group
        self.abandoned = threading.Event()
        self.handles: list[Handle] = []
        self.begun: list[Tensor] = []

    def join(
        self, kind: str, address: list[Any], generation: int, rank: int, size: int, timeout_s: float, **more: Any
    ) -> float:
        """How long it took, in seconds."""
        self.abandoned.clear()
        begun_s = time.monotonic()
        self.group = KINDS[kind](
            StoreAddress(*address), generation, rank, size, abandoned=self.abandoned.is_set, timeout_s=timeout_s, **more
        )
        return time.monotonic() - begun_s

    def reduce(self, seed: int, even: bool = True, dtype: str = "float64", large: bool = False) -> dict[str, Any]:
        """A digest of the sums; from rank 0 also the worst error, in units of the sum of magnitudes."""
        group, kind, shapes = self.group, getattr(torch, dtype), LARGE if large else SHAPES
        own = gradients(seed, group.rank, kind, shapes)
        strides = [values.stride() for values in own]
        group.all_reduce(own, weights(group.size, even)[group.rank])
        assert [values.stride() for values in own] == strides
        if group.rank != 0:
            return {"digest": digest(own)}
        right, units = expected(seed, group.size, even, kind, shapes)
        errors = [
            float(((found.double() - value).abs() / unit).max())
            for found, value, unit in zip(own, right, units, strict=True)
            if found.numel()
        ]
        return {"digest": digest(own), "error": max(errors)}

    def begin(self, bucket_index: int, seed: int) -> str:
        own = gradients(seed, self.group.rank, torch.float64)
        self.begun += own
        self.handles.append(self.group.all_reduce_begin(bucket_index, own, 1 / self.group.size))
        return "begun"

    def wait(self) -> str:
        """A digest of what was begun."""
        handles, self.handles = self.handles, []
        self.group.wait(handles)
        found, self.begun = digest(self.begun), []
        return found

    def reduce_on(self) -> None:
        """Reduce until it fails."""
        own = gradients(0, self.group.rank, torch.float32)
        while True:
            self.group.all_reduce(own, 1 / self.group.size)

    def broadcast(self, seed: int, source: int) -> bool:
        """Whether the source's values came, of all dtypes."""
        own, right = _of_all_dtypes(seed, self.group.rank), _of_all_dtypes(seed, source)
        self.group.broadcast(own, source)
        return all(torch.equal(*pair) for pair in zip(own, right, strict=True))

    def abandon(self) -> str:
        self.group.abandon()
        return "abandoned"

    def close(self) -> str:
        self.group.close()
        return "closed"

    def refused(self) -> list[str]:
        """What an all-reduce of each of these says."""
        said = []
        mixed = [torch.ones(2), torch.ones(2, dtype=torch.float64)]
        for call in (
            lambda: self.group.all_reduce([torch.ones(2), torch.ones(2, dtype=torch.int64)], 0.5),
            lambda: self.group.all_reduce([torch.ones(2, device="meta")], 0.5),
            lambda: self.group.all_reduce([torch.ones(2)], float("nan")),
            lambda: self.group.all_reduce_begin(0, mixed, 0.5),
            lambda: self.group.broadcast([torch.ones(2)], self.group.size),
        ):
            try:
                call()
                said.append("nothing")
            except MillraceError as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    def sent_bytes(self) -> int:
        """What the connections over TCP that are open now have sent, as the system counts it."""
        total = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    known = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                    total += struct.unpack_from("<Q", known, _BYTES_ACKED_AT)[0]
        return total

    def open(self) -> dict[str, int]:
        """Threads, open files, and mapped regions of groups."""
        maps = Path("/proc/self/maps").read_text().count("memfd:millrace-group")
        return {
            "threads": len(os.listdir("/proc/self/task")),
            "files": len(os.listdir("/proc/self/fd")),
            "maps": maps,
        }


def _of_all_dtypes(seed: int, rank: int) -> list[Tensor]:
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64)
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    made = []
    for shape in SHAPES:
        for kind in kinds:
            values = torch.randint(0, 2, shape, generator=generator).to(kind)
            made.append(values.transpose(0, -1) if values.dim() >= 2 and kind == torch.float32 else values)
    return made


def be_rank(calls: TextIO, answers: TextIO) -> None:
    """Answer until there are no more calls."""
    rank, asked_for = Rank(), queue.SimpleQueue[dict[str, Any] | None]()

    def listen() -> None:
        for line in calls:
            asked = json.loads(line)
            if asked.get("abandon"):
                rank.abandoned.set()
            else:
                asked_for.put(asked)
        rank.abandoned.set()
        asked_for.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (asked := asked_for.get()) is not None:
        begun_s = time.monotonic()
        try:
            answer = {"answer": getattr(rank, asked.pop("call"))(**asked)}
        except MillraceError as error:
            seconds = time.monotonic() - begun_s
            answer = {"error": type(error).__name__, "message": str(error), "seconds": seconds}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Fork a rank for every path of a socket, and answer with its process id; then say how the ranks have ended."""
    torch.set_num_threads(1)
    pids = []
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(line.strip())
                be_rank(connection.makefile("r"), connection.makefile("w"))
            return
        pids.append(pid)
        print(json.dumps(pid), flush=True)
    print(json.dumps({pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}), flush=True)


if __name__ == "__main__":
    main()
