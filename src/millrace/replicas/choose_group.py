"""Which kind of group the members of a generation form."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from millrace.replicas.collective import Group
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.host_group import HostGroup
from millrace.replicas.line import LOOPBACK, Line
from millrace.replicas.nccl_group import NcclGroup
from millrace.replicas.protocol import Fields
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.settings import Travel
from millrace.replicas.shared_group import SharedGroup


def form_group(line: Line, store: StoreAddress, form: Fields, travel: Travel, gpu: torch.device | None = None) -> Group:
    """Meet the others of a generation.

    Tensors on CPUs go through the memory of one host where all are on it and nothing is narrowed, and otherwise over
    the network. Those on GPUs go by NCCL where every member has a GPU of its own and `travel` wants nothing else, and
    otherwise through their hosts.

    Args: line: of this member. store: where they meet. form: what the driver said: `generation, rank, size, one_host,
        own_gpus, timeout_s`. travel: how gradients do. gpu: where this member's tensors are; None: on the CPU.

    Raises: WorkerError when the others do not come, or the driver gives the generation up.
    """
    generation, rank, size = form["generation"], form["rank"], form["size"]
    settings: dict[str, Any] = {"abandoned": partial(line.abandoned, generation), "timeout_s": form["timeout_s"]}
    host = line.host or LOOPBACK
    if gpu is not None and form["own_gpus"] and travel == Travel(overlap=travel.overlap):
        return NcclGroup(store, generation, rank, size, device=gpu, host=host, **settings)
    fits = form["one_host"] and travel.wire is None
    group: Group
    if travel.transport == "shared_memory" or (travel.transport is None and fits):
        group = SharedGroup(store, generation, rank, size, **settings)
    else:
        group = GlooGroup(store, generation, rank, size, host=host, wire=travel.wire, **settings)
    return group if gpu is None else HostGroup(group, gpu, **settings)
