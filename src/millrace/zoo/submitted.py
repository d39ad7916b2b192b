"""Runs on a cluster elsewhere. A run is a job there; when it is resumed, another job goes on in the same directory.

What millrace needs to know of such a run later, the cluster keeps as the job's notes. The code of this millrace travels
with the job; PyTorch and the rest are the cluster's.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from millrace.errors import RunDirectoryError, SettingError, WorkerError
from millrace.runtime.jobs import Job, JobRequest, Jobs
from millrace.train.progress_lines import last_progress
from millrace.train.run_names import chosen_name
from millrace.train.run_summary import RunSummary
from millrace.version import __version__

HOME = "~/"
_PACKAGE = Path(__file__).parents[1]
_STOP_WITHIN_S = 3600  # from SIGTERM to SIGKILL by Ray, whose 3 s are too few for a checkpoint; `kill` is quicker
_KILL_WITHIN_S = 120.0
_LOOK_S = 0.5
_INTERRUPTED = 130
_RUN, _VERSION, _DIRECTORY, _ARGUMENTS, _ASKED = "run", "millrace", "run_dir", "arguments", "asked"


@dataclass(frozen=True)
class Asked:
    """What Ray is to reserve: cpus, gpus for the process that reads the data, and trains where there are no replicas;
    one core each for the processes of the replicas, and with on_gpus one GPU."""

    cpus: float = 1.0
    gpus: float = 0.0
    processes: int = 0
    on_gpus: bool = False

    @property
    def all_cpus(self) -> float:
        """Those of the replicas' processes with them."""
        return self.cpus + self.processes

    @property
    def all_gpus(self) -> float:
        """Those of the replicas' processes with them."""
        return self.gpus + (self.processes if self.on_gpus else 0)

    def __str__(self) -> str:
        also = f" and {self.processes} for its replicas' processes" if self.processes else ""
        return f"{self.cpus:g} CPU{also}" + (f", {self.all_gpus:g} GPU" if self.all_gpus else "")


@dataclass(frozen=True)
class SubmittedRun:
    """A run and its jobs, the newest last."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def job(self) -> Job:
        """The newest."""
        return self.jobs[-1]

    @property
    def asked(self) -> Asked:
        """What it asks of Ray."""
        return Asked(**json.loads(self.job.notes[_ASKED]))

    @property
    def directory(self) -> str:
        """Its run directory, on the cluster's head."""
        return self.job.notes[_DIRECTORY]

    @property
    def state(self) -> str:
        """In the words of `millrace runs`."""
        job = self.job
        if job.status == "stopped" or (job.status == "failed" and job.exit_code == _INTERRUPTED):
            return "interrupted"
        if job.status == "failed" and job.exit_code is not None and (job.exit_code < 0 or job.exit_code > 128):
            return "killed"
        return {"succeeded": "finished"}.get(job.status, job.status)


def submit(
    jobs: Jobs,
    task: str,
    arguments: Sequence[str],
    division: Sequence[str],
    *,
    asked: Asked,
    directory: str,
    python: str,
    may_grow: bool = False,
) -> SubmittedRun:
    """Hand a new run in.

    Args:
        task: its name. arguments: of `millrace train`, without those of `division`: how the run is divided.
        asked: what Ray is to reserve.
        directory: of all runs, on the cluster's head; may begin with "~/".
        python: the command there.
        may_grow: the cluster may get machines that it does not have yet.

    Raises:
        SettingError: it never fits into the cluster.
        WorkerError: the cluster does not take it.
    """
    if not may_grow:
        _check_room(jobs, asked)
    name = f"{task}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    where = f"{directory.rstrip('/')}/{name}"
    command = f"train {shlex.join([task, *arguments])} --run-dir {_in_shell(where)}"
    _hand_in(jobs, name, name, command, division, asked, where, python)
    return find_submitted(jobs, name)


def resume(jobs: Jobs, run: SubmittedRun, arguments: Sequence[str], python: str) -> SubmittedRun:
    """Go on with a run that has ended. Raises: SettingError when it has not; WorkerError."""
    if not run.job.over:
        raise SettingError(f"{run.name} is {run.state} at {jobs.address}: it need not be resumed. See millrace logs.")
    command = " ".join(["train --resume", _in_shell(run.directory), shlex.join(arguments)]).strip()
    division = json.loads(run.job.notes[_ARGUMENTS])
    _hand_in(jobs, f"{run.name}.{len(run.jobs) + 1}", run.name, command, division, run.asked, run.directory, python)
    return find_submitted(jobs, run.name)


def kill(jobs: Jobs, run: SubmittedRun, python: str) -> None:
    """SIGKILL a running run's process, by a job of its own beside it. Raises: WorkerError with what that job said."""
    name = f"kill-{run.name}-{secrets.token_hex(2)}"
    command = f"exec {python} -m millrace stop {_in_shell(run.directory)} --force"
    jobs.submit(JobRequest(name, command, cpus=0.0, ships=_PACKAGE))
    end_s = time.monotonic() + _KILL_WITHIN_S
    while not (job := jobs.get(name)).over and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
    if job.status != "succeeded":
        raise WorkerError(f"{run.name} could not be killed: {job.message or job.status}")


def submitted_runs(jobs: Jobs) -> list[SubmittedRun]:
    """All runs of millrace that the cluster knows, by the time of their newest job."""
    found: dict[str, list[Job]] = {}
    for job in sorted(jobs.all(), key=lambda job: job.started_s):
        if _VERSION in job.notes and _RUN in job.notes:
            found.setdefault(job.notes[_RUN], []).append(job)
    runs = [SubmittedRun(name, tuple(its)) for name, its in found.items()]
    return sorted(runs, key=lambda run: run.job.started_s)


def find_submitted(jobs: Jobs, name: str) -> SubmittedRun:
    """The run that a person means: its name, the beginning of one, or "latest".

    Raises: SettingError when there is none, or there are several; the message shows the near names.
    """
    runs = {run.name: run for run in submitted_runs(jobs)}
    if name == "latest" and runs:
        return list(runs.values())[-1]
    try:
        return runs[chosen_name(name, list(runs), f"{jobs.address} by the name {name!r}")]
    except RunDirectoryError as error:
        raise SettingError(str(error)) from error


def summarize_submitted(jobs: Jobs, run: SubmittedRun) -> RunSummary:
    """The present state of a run, by what it has written. Raises: WorkerError."""
    shown = last_progress(log_of(jobs, run))
    started_s = run.job.started_s
    return RunSummary(
        run.name, Path(run.directory), run.state, shown.step, shown.loss, shown.steps_per_s, started_s, started_s
    )


def log_of(jobs: Jobs, run: SubmittedRun) -> str:
    """What all jobs of a run have written. Raises: WorkerError."""
    return "".join(jobs.log(job.name) for job in run.jobs if job.status != "waiting")


def why_waiting(jobs: Jobs, run: SubmittedRun) -> str:
    """What a run that has not started waits for."""
    size = jobs.size()
    others = [other for other in submitted_runs(jobs) if not other.job.over and other.name != run.name]
    busy = ", ".join(f"{other.name} ({other.asked})" for other in others)
    return (
        f"it asks for {run.asked}; Ray at {jobs.address} has {size.cpus:g} CPU, {size.gpus:g} GPU on {size.machines} "
        f"machines. {f'Before it: {busy}. ' if busy else ''}It starts when there is room, and fails if there is none "
        "within the cluster's RAY_JOB_START_TIMEOUT_SECONDS (15 minutes)."
    )


def _check_room(jobs: Jobs, asked: Asked) -> None:
    size = jobs.size()
    if asked.all_cpus > size.cpus or asked.all_gpus > size.gpus:
        raise SettingError(
            f"the run asks for {asked}, and Ray at {jobs.address} has {size.cpus:g} CPU, {size.gpus:g} GPU on "
            f"{size.machines} machines in all: it would wait for ever. Ask for less (--replicas, --cpus, --gpus), or "
            "say --may-grow where the cluster adds machines as they are needed."
        )


def _hand_in(
    jobs: Jobs,
    job: str,
    run: str,
    command: str,
    division: Sequence[str],
    asked: Asked,
    directory: str,
    python: str,
) -> None:
    threads = str(max(1, int(asked.cpus)))
    # Ray names its cluster to the job; `exec`, so that Ray's signals reach millrace and no shell.
    whole = f"exec {python} -m millrace {command} {shlex.join(division)}" + (
        ' --cluster "$RAY_ADDRESS"' if asked.processes else ""
    )
    jobs.submit(
        JobRequest(
            job,
            whole,
            asked.cpus,
            asked.gpus,
            ships=_PACKAGE,
            environment={
                "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WITHIN_S),
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
            },
            notes={
                _RUN: run,
                _VERSION: __version__,
                _DIRECTORY: directory,
                _ARGUMENTS: json.dumps(list(division)),
                _ASKED: json.dumps(vars(asked)),
            },
        )
    )


def _in_shell(path: str) -> str:
    """A path as one word of a shell, which is to find the home directory."""
    if not path.startswith(HOME):
        return shlex.quote(path)
    rest = path.removeprefix(HOME)
    return '"$HOME"/' + (rest if re.fullmatch(r"[\w./-]+", rest) else shlex.quote(rest))
