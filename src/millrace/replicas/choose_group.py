"""Which kind of group the members of a generation form."""

from __future__ import annotations

from functools import partial
from typing import Any

from millrace.replicas.collective import Group
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.line import LOOPBACK, Line
from millrace.replicas.protocol import Fields
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.settings import Travel
from millrace.replicas.shared_group import SharedGroup


def form_group(line: Line, store: StoreAddress, form: Fields, travel: Travel) -> Group:
    """Meet the others of a generation; through the memory of one host where all are on it and nothing is narrowed.

    Args: line: of this member. store: where they meet. form: what the driver said: `generation, rank, size, one_host,
        timeout_s`. travel: how gradients do.

    Raises: WorkerError when the others do not come, or the driver gives the generation up.
    """
    generation, rank, size = form["generation"], form["rank"], form["size"]
    settings: dict[str, Any] = {"abandoned": partial(line.abandoned, generation), "timeout_s": form["timeout_s"]}
    fits = form["one_host"] and travel.wire is None
    if travel.transport == "shared_memory" or (travel.transport is None and fits):
        return SharedGroup(store, generation, rank, size, **settings)
    host = line.host or LOOPBACK
    return GlooGroup(store, generation, rank, size, host=host, wire=travel.wire, **settings)
