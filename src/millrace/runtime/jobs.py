"""Jobs on a Ray cluster elsewhere: what can be asked of it. `runtime/ray_jobs.py` does it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from millrace.runtime.ray_token import offer_token

JobStatus = Literal["waiting", "running", "stopped", "succeeded", "failed"]


@dataclass(frozen=True)
class JobRequest:
    """A command for a cluster's head. name: used once for ever. cpus, gpus: what Ray is to reserve for it.

    ships: the directory of a package that travels with it, so that it is imported there as it is here.
    """

    name: str
    command: str
    cpus: float
    gpus: float = 0.0
    ships: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it. message: what Ray says of it. exit_code: None until it has ended. started_s: when
    it was submitted, since the epoch."""

    name: str
    status: JobStatus
    message: str
    exit_code: int | None
    started_s: float
    notes: Mapping[str, str]

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status not in ("waiting", "running")


@dataclass(frozen=True)
class ClusterSize:
    """What a cluster has in all, busy or not."""

    cpus: float
    gpus: float
    machines: int


class Jobs(Protocol):
    """The jobs of one cluster. All methods raise WorkerError when the cluster does not answer or refuses.

    address: what a user calls the cluster.
    """

    address: str

    def submit(self, request: JobRequest) -> None:
        """Hand a job in; it starts when there is room."""
        ...

    def all(self) -> list[Job]:
        """All that were ever submitted."""
        ...

    def get(self, name: str) -> Job:
        """One of them, as it is now."""
        ...

    def log(self, name: str) -> str:
        """What it has written to its standard output and error."""
        ...

    def stop(self, name: str) -> None:
        """Send it SIGTERM, or take it out of the queue. Returns at once."""
        ...

    def size(self) -> ClusterSize:
        """What the cluster has."""
        ...


def open_jobs(address: str) -> Jobs:
    """The jobs of a cluster.

    Args: address: "http://HOST:8265" (its dashboard), "ray://HOST:10001", "HOST:6379", or "local" for the Ray that
        somebody has started on this machine.

    Raises: SettingError when Ray is not installed, no cluster answers there, or it does not take our token.
    """
    offer_token(address)
    ray_jobs = importlib.import_module("millrace.runtime.ray_jobs")
    jobs: Jobs = ray_jobs.RayJobs(address)
    return jobs
