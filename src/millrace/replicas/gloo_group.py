"""A group whose ranks may be on several hosts: gloo's collectives over TCP.

What gloo is like, and how that is met:

- An operation whose peer is frozen, and sometimes one whose peer was killed, ends only at the group's own time-out;
  neither `abort` nor destroying the group frees it, and destroying waits for it. So operations are only asked whether
  they are done, and a group is destroyed only when all of its operations are. Until then a count that nobody gives
  back keeps it alive, also while the interpreter ends.
- An abandoned operation may still write to its tensors when the peer goes on. gloo keeps those alive with it.

A bucket of float32 or float64 is reduced by gloo's ring. One that travels as bfloat16 would be rounded at every hop
there. So every rank sends each other rank its share of the elements, rounded once; adds up what it got for its own
share, in float32 (float64 for float64) and in the order of the ranks; and sends the sum, rounded once more, to all.
With weights wᵣ and tensors gᵣ an element of the result is off by at most 2.01 · 2⁻⁸ · Σ |wᵣ gᵣ| within bfloat16's
normal range, whatever the number of ranks.
"""

from __future__ import annotations

import ctypes
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

from millrace.errors import SettingError
from millrace.replicas.rendezvous import GRACE_S, StoreAddress
from millrace.replicas.settings import WIRE
from millrace.replicas.torch_group import Flight, TorchGroup, naming, pack, unpack

WIRES = (None, WIRE)
_THREADS = (
    8  # operations under way at a time; with gloo's own 2, sixty tensors took a fifth longer between 2 and 4 ranks
)
_NARROWED_ELEMENTS = 1 << 22  # that travel together, so that sums are made while others are under way


class GlooGroup(TorchGroup):
    """One rank's end."""

    def __init__(
        self,
        store_address: StoreAddress,
        generation: int,
        rank: int,
        size: int,
        *,
        abandoned: Callable[[], bool],
        timeout_s: float,
        host: str = "127.0.0.1",
        wire: str | None = None,
    ) -> None:
        """The group, once all ranks have come.

        Args:
            store_address: of the driver's `Rendezvous`.
            generation: no two groups at one store have the same.
            rank, size: this process's number in the group, and how many there are.
            abandoned: whether the driver has given this group up; asked during every wait.
            timeout_s: seconds for the others to come, and later for any wait: far above what a step takes.
            host: address of the network interface of this host that gradients go through.
            wire: "bfloat16" halves what float32 gradients send, for networks slower than about 1 GB/s; its error is
                stated above. None sends them as they are.

        Raises:
            WorkerError: the others did not come, the group was abandoned before, or the driver cannot be reached.
        """
        super().__init__(generation, rank, size, abandoned, timeout_s)
        if wire not in WIRES:
            raise SettingError(f"wire is one of {', '.join(map(repr, WIRES))}, not {wire!r}.")
        self._wire = wire
        self.works_in_wait = wire is not None  # whose second operations begin there
        self._kept: _Kept | None = None
        _let_go_of_ended()
        if size > 1:
            group, store = self._patience.call(
                lambda: _form(store_address, generation, rank, size, timeout_s, host),
                f"the {size - 1} other rank(s) of generation {generation} at {store_address.host}:{store_address.port}",
            )
            self._kept = _Kept(group, [], store)

    def _release(self) -> None:
        if self._kept is not None:
            _LEFT.append(self._kept)
            self._kept = None
        super()._release()
        _let_go_of_ended()

    def _begin(self, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> None:
        what = f"bucket {bucket_index} ({sum(tensor.nbytes for tensor in tensors):,} bytes) of an all-reduce"
        if self._wire is not None or tensors[0].dtype == torch.bfloat16:
            self._flights[bucket_index] = self._narrowed(what, bucket_index, tensors, weight)
        else:
            self._flights[bucket_index] = [self._all_reduce_flat(what, bucket_index, tensors, weight)]

    def _narrowed(self, what: str, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> list[Flight]:
        count = -(-sum(tensor.numel() for tensor in tensors) // self.size) * self.size
        sent = self._buffer((bucket_index, "sent"), tensors[0], torch.bfloat16, count)
        came = self._buffer((bucket_index, "came"), tensors[0], torch.bfloat16, count)
        pack(tensors, weight, sent)
        wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        length = _NARROWED_ELEMENTS // self.size * self.size
        flights = [
            self._narrowed_part(what, sent[at : at + length], came[at : at + length], wide)
            for at in range(0, count, length)
        ]
        flights[-1].then.append(lambda: unpack(tensors, sent))
        return flights

    def _narrowed_part(self, what: str, sent: Tensor, came: Tensor, wide: torch.dtype) -> Flight:
        def gather() -> Work:
            shares = came.view(self.size, -1)
            total = shares[0].to(wide)
            for other in shares[1:]:
                total += other
            return self._operation(lambda group: group._allgather_base(sent, total.to(torch.bfloat16)))

        return self._start(what, lambda group: group.alltoall_base(came, sent, [], []), gather)

    def _operation(self, operation: Callable[[Any], Work]) -> Work:
        """Hand one to gloo, which does it in a thread of its own."""
        kept = self._kept
        assert kept is not None  # a closed group has refused before
        with naming(self._patience.who, "the start of an operation"):
            work = operation(kept.group)
        kept.works = [*(w for w in kept.works if not w.is_completed()), work]
        return work


@dataclass
class _Kept:
    """A group of gloo's, its operations that may not be done, and its store. It is kept alive until `let_go`."""

    group: ProcessGroupGloo
    works: list[Work]
    store: Store

    def __post_init__(self) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))

    def let_go(self) -> None:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self.group))


_LEFT: list[_Kept] = []


def _let_go_of_ended() -> None:
    """Destroy the closed groups of which no operation is under way any more."""
    for kept in list(_LEFT):
        if all(work.is_completed() for work in kept.works):
            _LEFT.remove(kept)
            kept.let_go()


def _form(
    address: StoreAddress, generation: int, rank: int, size: int, timeout_s: float, host: str
) -> tuple[ProcessGroupGloo, Store]:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._threads = _THREADS
    options._timeout = datetime.timedelta(seconds=timeout_s + GRACE_S)
    store = address.connect(generation, timeout_s)
    return ProcessGroupGloo(store, rank, size, options), store
