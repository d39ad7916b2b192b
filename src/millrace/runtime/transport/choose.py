"""Which transport the workers of a program use, and what they have to know to find each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import SettingError, did_you_mean
from millrace.partition.program import Edge
from millrace.place.cluster import host_of
from millrace.runtime.transport import gloo, shared_memory
from millrace.runtime.transport.base import Transport, describe

SHARED_MEMORY, GLOO = "shared_memory", "gloo"
TRANSPORTS = (SHARED_MEMORY, GLOO)


@dataclass(frozen=True)
class Meeting:
    """Where the workers of one program meet.

    kind: one of `TRANSPORTS`. directory: private to the user, new for every program, the same for all its workers.
    devices: all of the program, in the same order for every worker. timeout_s: for the others to come.
    """

    kind: str
    directory: Path
    devices: tuple[str, ...]
    timeout_s: float


def check_transport(wanted: str | None) -> None:
    """Raises: SettingError for what is neither None nor one of `TRANSPORTS`."""
    if wanted is not None and wanted not in TRANSPORTS:
        raise SettingError(
            f"transport={wanted!r}: expected {' or '.join(map(repr, TRANSPORTS))}, or None to have it chosen. "
            + did_you_mean(str(wanted), list(TRANSPORTS))
        )


def choose(edges: Iterable[Edge], wanted: str | None = None) -> str:
    """Shared memory where every edge stays on its host, otherwise gloo; or what is wanted.

    Raises: SettingError for shared memory between hosts.
    """
    distant = next((edge for edge in edges if host_of(edge.source) != host_of(edge.target)), None)
    if wanted == SHARED_MEMORY and distant is not None:
        raise SettingError(
            f"transport={wanted!r}, but {describe(distant)} joins two hosts, which share no memory. "
            f"Use {GLOO!r}, or leave the choice open."
        )
    return wanted or (SHARED_MEMORY if distant is None else GLOO)


def connect(device: str, edges: Sequence[Edge], meeting: Meeting, address: str) -> Transport:
    """This worker's transport, once the others have come.

    Args: address: of this host's network interface, for gloo.

    Raises: WorkerError when a worker did not come in time; SettingError as the transport does.
    """
    if meeting.kind == SHARED_MEMORY:
        return shared_memory.connect(device, edges, meeting.directory, meeting.timeout_s)
    store = meeting.directory / "gloo"
    return gloo.connect(device, meeting.devices, edges, store, meeting.timeout_s, address)
