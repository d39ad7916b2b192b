"""What the commands on runs have in common where a run is on a cluster elsewhere (--cluster)."""

from __future__ import annotations

import argparse
import sys
import time

from millrace.runtime.jobs import Jobs
from millrace.zoo.submitted import SubmittedRun, find_submitted, log_of, why_waiting

_LOOK_S = 1.0
_SAY_S = 5.0


def add_cluster(options: argparse.ArgumentParser) -> None:
    """--cluster."""
    options.add_argument(
        "--cluster", metavar="WHERE", help="of a submitted run: http://HOST:8265, ray://HOST:10001, HOST:6379 or local"
    )


def add_python(options: argparse.ArgumentParser) -> None:
    """--python."""
    options.add_argument("--python", default="python", metavar="COMMAND", help="Python on the cluster (python)")


def follow(jobs: Jobs, run: SubmittedRun) -> int:
    """Print what a run says until it ends; 0 where it has finished."""
    printed, told = 0, False
    while True:
        run = find_submitted(jobs, run.name)  # before the log, so that nothing is missed at the end
        log = log_of(jobs, run)
        print(log[printed:], end="", flush=True)
        printed = len(log)
        if run.job.over:
            print(f"{run.name} is {run.state}", file=sys.stderr)
            return 0 if run.state == "finished" else 1
        if run.job.status == "waiting" and not told:
            told = True
            print(f"{run.name} waits: {why_waiting(jobs, run)}", file=sys.stderr)
        time.sleep(_LOOK_S)


def wait_for_end(jobs: Jobs, run: SubmittedRun, within_s: float) -> SubmittedRun:
    """The run when it has ended, or as it is after so long; says now and then that it has not."""
    began_s = said_s = time.monotonic()
    while not run.job.over and time.monotonic() - began_s < within_s:
        time.sleep(_LOOK_S)
        run = find_submitted(jobs, run.name)
        if time.monotonic() - said_s > _SAY_S:
            said_s = time.monotonic()
            print(f"waiting since {said_s - began_s:.0f} s", file=sys.stderr)
    return run
