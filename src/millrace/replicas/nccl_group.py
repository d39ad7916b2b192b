"""A group whose ranks have a GPU each: NCCL's collectives, between the GPUs of a host and between hosts.

What NCCL is like, and how that is met:

- An operation whose peer was killed or is frozen never ends: it keeps its part of the GPU. Only aborting frees that,
  and it may itself block for a while; so it is left to a thread of its own. Where NCCL itself has seen that a peer is
  gone, the operation counts as done, and waiting for it aborts and raises.
- torch watches NCCL by a thread that ends the whole process at an error or a time-out. Here the driver decides who has
  to end: what can be switched off of that watch is, and operations have a time-out that never comes.
- The first operation of each kind would connect with the peers while it is called, deaf to everything. NCCL is told to
  connect when a group forms. That takes seconds, and one whose peer does not come ends only with its process.
- An operation follows what the GPU was given before it, and what the GPU is given after `wait` follows the operation.
- Two ranks on one GPU are refused, or hang: `choose_group` has such ranks meet on their hosts.

bfloat16 travels as float32, so that it is rounded once and not at every hop.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import Store, Work  # type: ignore[attr-defined]

from millrace.errors import WorkerError
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.torch_group import TorchGroup, naming

FORM_S = 60.0  # the least that forming may take
_UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "NCCL_RUNTIME_CONNECT": "0",
}
_NEVER = datetime.timedelta(days=30)
_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


class NcclGroup(TorchGroup):
    """One rank's end."""

    device_type = "cuda"

    def __init__(
        self,
        store_address: StoreAddress,
        generation: int,
        rank: int,
        size: int,
        *,
        abandoned: Callable[[], bool],
        timeout_s: float,
        device: torch.device,
        host: str = "127.0.0.1",
    ) -> None:
        """The group, once all ranks have come.

        Args: device: the GPU of this rank; no other rank has it. host: address of the network interface of this host
            over which ranks find each other, unless $NCCL_SOCKET_IFNAME names one. The others as of `GlooGroup`.

        Raises: WorkerError as `GlooGroup`, and when this PyTorch has no NCCL.
        """
        super().__init__(generation, rank, size, abandoned, timeout_s)
        self._group: Any = None
        self._store: Store | None = None
        if size > 1:
            self._group, self._store = self._patience.call(
                lambda: form(store_address, generation, rank, size, timeout_s, device, host),
                f"the {size - 1} other rank(s) of generation {generation} at {store_address.host}:{store_address.port}",
            )

    def _release(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            threading.Thread(target=_abort, args=(group, self._store), name="millrace-abort", daemon=True).start()
        super()._release()

    def _begin(self, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> None:
        what = f"bucket {bucket_index} ({sum(tensor.nbytes for tensor in tensors):,} bytes) of an all-reduce"
        self._flights[bucket_index] = [self._all_reduce_flat(what, bucket_index, tensors, weight)]

    def _operation(self, operation: Callable[[Any], Work]) -> Work:
        """Put one behind what the GPU has to do."""
        with naming(self._patience.who, "the start of an operation"):
            return operation(self._group)


def form(
    address: StoreAddress, generation: int, rank: int, size: int, timeout_s: float, device: torch.device, host: str
) -> tuple[Any, Store]:
    """A group of torch's that has met, and the store that it met at."""
    if not distributed.is_nccl_available():
        raise WorkerError(f"PyTorch {torch.__version__} was built without NCCL. Pass transport='gloo'.")
    os.environ.update(_UNWATCHED)  # they are read when a group is made
    if (interface := _interface_of(host)) is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    store = address.connect(generation, timeout_s)
    group = distributed.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group, store


def _interface_of(host: str) -> str | None:
    """The network interface that has this IPv4 address; None where there is none, and NCCL chooses."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no such address
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == host:
                    return name
    return None


def _abort(group: Any, _: Store | None) -> None:
    """Free what the operations hold of the GPU. The store has to live as long as the group."""
    group.abort()
