"""Jobs through Ray's Job Submission API: HTTP to the dashboard of a cluster, with Ray's token.

Beside `ray_launch` the only module that imports Ray; `jobs.open_jobs` imports it, when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from millrace.errors import SettingError, WorkerError
from millrace.runtime.jobs import ClusterSize, Job, JobRequest, JobStatus

_INSTALL = "Install it with: pip install 'millrace[jobs]'"
try:
    import ray
    from ray._raylet import Config  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobDetails, JobSubmissionClient
    from ray.util.state import list_nodes
except ImportError as error:
    raise SettingError(f"Jobs on a cluster need Ray, which cannot be imported ({error}). {_INSTALL}") from error

_ANSWER_S = 5.0  # for a cluster's port
_STATUS: dict[str, JobStatus] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
}
# A slice of a resource that only the head has, so that the files of a run and of its resumption are in one place.
_ON_THE_HEAD = {"node:__internal_head__": 0.001}


class RayJobs:
    """See `jobs.Jobs`, and `jobs.open_jobs` for the address."""

    def __init__(self, address: str) -> None:
        self.address = address
        _check_address(address)
        if not ray.is_initialized():
            Config.initialize("")  # RAY_AUTH_MODE may have been set after Ray was imported
        try:
            with _quiet():
                self._client = JobSubmissionClient("auto" if address == "local" else address)
        except AuthenticationError as error:
            raise SettingError(f"Ray at {address} refuses us: {_first(error)} {_TOKEN}") from error
        except Exception as error:
            how = (
                "no Ray with a dashboard runs on this machine. Start one: RAY_AUTH_MODE=token ray start --head"
                if address == "local"
                else "see whether its dashboard runs there, and is a Ray of version 2.59 or later"
            )
            raise SettingError(f"Ray's jobs at {address} do not answer ({_first(error)}): {how}.") from error

    def submit(self, request: JobRequest) -> None:
        """See `Jobs.submit`."""
        environment: dict[str, Any] = {"env_vars": dict(request.environment)}
        if request.ships is not None:
            environment |= {"py_modules": [str(request.ships)], "excludes": ["**/__pycache__"]}
        with self._asking(f"take {request.name}"):
            self._client.submit_job(
                submission_id=request.name,
                entrypoint=request.command,
                runtime_env=environment,
                metadata=dict(request.notes),
                entrypoint_num_cpus=request.cpus,
                entrypoint_num_gpus=request.gpus,
                entrypoint_resources=dict(_ON_THE_HEAD),
            )

    def all(self) -> list[Job]:
        """See `Jobs.all`."""
        with self._asking("list its jobs"):
            return [_job(details) for details in self._client.list_jobs() if details.submission_id]

    def get(self, name: str) -> Job:
        """See `Jobs.get`."""
        with self._asking(f"tell of {name}"):
            return _job(self._client.get_job_info(name))

    def log(self, name: str) -> str:
        """See `Jobs.log`."""
        with self._asking(f"give the log of {name}"):
            log: str = self._client.get_job_logs(name)
            return log

    def stop(self, name: str) -> None:
        """See `Jobs.stop`."""
        with self._asking(f"stop {name}"):
            self._client.stop_job(name)

    def size(self) -> ClusterSize:
        """See `Jobs.size`."""
        with self._asking("list its machines"):
            nodes = list_nodes(address=self._client.get_address(), filters=[("state", "=", "ALIVE")])
        totals = [node.resources_total or {} for node in nodes]
        return ClusterSize(sum(t.get("CPU", 0.0) for t in totals), sum(t.get("GPU", 0.0) for t in totals), len(nodes))

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except AuthenticationError as error:
            raise SettingError(f"Ray at {self.address} refuses us: {_first(error)} {_TOKEN}") from error
        except Exception as error:
            raise WorkerError(f"Ray at {self.address} did not {what}: {_first(error)}") from error


_TOKEN = "Give the cluster's token: RAY_AUTH_TOKEN=…, or RAY_AUTH_TOKEN_PATH=FILE."


def _job(details: JobDetails) -> Job:
    notes = details.metadata or {}
    status = _STATUS[str(getattr(details.status, "value", details.status))]
    return Job(
        str(details.submission_id),
        status,
        details.message or "",
        details.driver_exit_code,
        (details.start_time or 0) / 1000,
        notes,
    )


def _check_address(address: str) -> None:
    """That somebody listens there, as Ray would take half a minute to find out that nobody does."""
    if address == "local":
        return
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https", "ray", "gcs") or not host or not port:
        raise SettingError(
            f"cluster {address!r} is none that takes jobs: expected http://HOST:8265 (its dashboard), "
            "ray://HOST:10001, HOST:6379, or local."
        )
    try:
        socket.create_connection((host, port), _ANSWER_S).close()
    except OSError as error:
        raise SettingError(
            f"nobody answers at {address} ({error.strerror or error}). Name the dashboard of a cluster that runs, such "
            "as http://HOST:8265; `ray start --head` starts one here."
        ) from error


def _first(error: BaseException) -> str:
    """The first line of what it says; Ray's are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own lines on standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
