"""Imported by a member of a run: it has the GPUs that $STAND_IN_GPUS names, and NCCL between them.

Which kinds of groups it forms is written to $STAND_IN_SEEN, a line each.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
from tests.replicas import stand_in
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store

from millrace.replicas import choose_group, gpus, nccl_group
from millrace.replicas.rendezvous import StoreAddress


def _seen(text: str) -> None:
    with open(os.environ["STAND_IN_SEEN"], "a") as file:
        file.write(f"{text}\n")


def _use_gpu(who: str, index: int) -> torch.device:
    _seen(f"{who} has GPU {gpus.visible_gpus()[index]}")
    return stand_in.use()


class _Work:
    """An operation on copies. Results are where they belong after `wait`."""

    def __init__(self, work: Any, copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._work, self._pairs = work, list(zip(copies, tensors, strict=True))
        self.is_completed = work.is_completed

    def wait(self) -> None:
        self._work.wait()
        for copy, tensor in self._pairs:
            tensor.copy_(copy)


class _OverGloo:
    """Has what is used of NCCL's groups."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = group

    def allreduce(self, tensors: list[Tensor]) -> _Work:
        assert {tensor.device for tensor in tensors} == {stand_in.use()}
        copies = [tensor.cpu() for tensor in tensors]
        return _Work(self._group.allreduce(copies), copies, tensors)

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Work:
        assert {tensor.device for tensor in tensors} == {stand_in.use()}
        copies = [tensor.cpu() for tensor in tensors]
        return _Work(self._group.broadcast(copies, options), copies, tensors)

    def abort(self) -> None:
        _seen("aborted")


def _form(
    address: StoreAddress, generation: int, rank: int, size: int, timeout_s: float, device: torch.device, host: str
) -> tuple[_OverGloo, Store]:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = datetime.timedelta(seconds=timeout_s)
    store = address.connect(generation, timeout_s)
    _seen("NCCL")
    return _OverGloo(ProcessGroupGloo(store, rank, size, options)), store


class _HostGroup(choose_group.HostGroup):
    def __init__(self, inner: Any, *given: Any, **named: Any) -> None:
        super().__init__(inner, *given, **named)
        _seen(f"{type(inner).__name__} of the hosts")


torch.distributed.is_nccl_available = lambda: os.environ.get("STAND_IN_NCCL") != "none"
gpus.visible_gpus = lambda: tuple(os.environ["STAND_IN_GPUS"].split(","))
gpus.use_gpu = _use_gpu
nccl_group.form = _form
nccl_group.NcclGroup.device_type = "standin"
choose_group.HostGroup = _HostGroup  # type: ignore[misc]
