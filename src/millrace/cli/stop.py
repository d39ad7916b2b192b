"""`millrace stop`: end a run as Ctrl-C does, from elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from millrace.cli.arguments import RUN_HELP, parser
from millrace.cli.remote import add_cluster, add_python, wait_for_end
from millrace.errors import RunDirectoryError, SettingError
from millrace.runtime.jobs import Jobs, open_jobs
from millrace.train.run_directory import RunDirectory
from millrace.train.run_summary import summarize
from millrace.train.stop_request import request_stop
from millrace.zoo.run import find_run
from millrace.zoo.submitted import SubmittedRun, find_submitted, kill, summarize_submitted

_DESCRIPTION = """\
Ask a run to stop, as Ctrl-C does: it ends its step, writes a checkpoint and can be resumed. Waits until it has done so;
to ask twice, or to stop waiting by Ctrl-C, does no harm."""
_EXAMPLES = """
millrace stop latest
millrace stop latest --wait 600     its steps, or its checkpoints, take long
millrace stop latest --force        kill it: it goes on from its last checkpoint
millrace stop latest --cluster http://10.0.0.5:8265"""
_LOOK_S, _SAY_S = 0.1, 5.0
_KILLED_S = 10.0


def main(arguments: list[str]) -> int:
    """Parse, ask, wait."""
    options = parser("stop", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    options.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="for its end, at most (60)")
    options.add_argument(
        "--force", action="store_true", help="kill its processes; the steps since its last checkpoint are lost"
    )
    add_cluster(options)
    add_python(options)
    given = options.parse_args(arguments)
    if given.cluster is not None:
        jobs = open_jobs(given.cluster)
        return _stop_submitted(jobs, find_submitted(jobs, given.run), given.force, given.wait, given.python)
    run = find_run(given.run)
    state = run.state
    if state.status != "running":
        print(f"{run.name} does not run: it is {state.status}, at step {state.step}.{_how_to_go_on(run)}")
        return 0
    if given.force:
        _kill(run)
        over = _wait(run, _KILLED_S)
    else:
        request_stop(run.path)
        print(f"{run.name} at step {summarize(run).step} was asked to stop", file=sys.stderr)
        over = _wait(run, given.wait)
    if not over:
        print(
            f"millrace stop: {run.name} (process {state.pid} on {state.host}) has not stopped within "
            f"{_KILLED_S if given.force else given.wait:g} s. It was asked, and stops after its step: wait on with the "
            f"same command, or kill it with --force, which loses the steps since its last checkpoint.",
            file=sys.stderr,
        )
        return 1
    state = run.state
    saved = "killed" if state.status == "killed" else f"{state.status} at step {state.step}"
    print(f"{run.name} is {saved}.{_how_to_go_on(run)}")
    return 0


def _stop_submitted(jobs: Jobs, run: SubmittedRun, force: bool, wait_s: float, python: str) -> int:
    go_on = f" To go on: millrace resume {run.name} --cluster {jobs.address}"
    if run.job.over:
        print(f"{run.name} does not run: it is {run.state}.{'' if run.state == 'finished' else go_on}")
        return 0
    if force and run.job.status == "running":
        kill(jobs, run, python)
    else:
        jobs.stop(run.job.name)
        print(f"{run.name} was asked to stop", file=sys.stderr)
    run = wait_for_end(jobs, run, wait_s)
    if not run.job.over:
        print(
            f"millrace stop: {run.name} at {jobs.address} has not stopped within {wait_s:g} s. It was asked, and stops "
            "after its step: wait on with the same command, or kill it with --force, which loses the steps since its "
            "last checkpoint.",
            file=sys.stderr,
        )
        return 1
    step = summarize_submitted(jobs, run).step
    print(f"{run.name} is {run.state} at step {step}.{'' if run.state == 'finished' else go_on}")
    return 0


def _wait(run: RunDirectory, within_s: float) -> bool:
    """Whether the run has ended in time; says now and then that it has not yet."""
    began_s = said_s = time.monotonic()
    while run.state.status == "running":
        now_s = time.monotonic()
        if now_s - began_s > within_s:
            return False
        if now_s - said_s > _SAY_S:
            said_s = now_s
            print(f"waiting since {now_s - began_s:.0f} s; it is at step {summarize(run).step}", file=sys.stderr)
        time.sleep(_LOOK_S)
    return True


def _kill(run: RunDirectory) -> None:
    """SIGKILL the run's process; its workers end with it."""
    state = run.state
    if state.host != socket.gethostname():
        raise SettingError(
            f"{run.name} runs on {state.host}, and this is {socket.gethostname()}: --force kills processes of this "
            f"machine only. Leave it out, or say it there."
        )
    try:
        process = os.pidfd_open(state.pid)
        try:
            # Once more: what the number meant before the process was opened may have ended since.
            now = run.state
            if (now.status, now.pid, now.started_at) == ("running", state.pid, state.started_at):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)
    except ProcessLookupError:
        return  # it has just ended
    except PermissionError as error:
        raise RunDirectoryError(
            f"{run.name} is process {state.pid} of another user: {error.strerror}. Leave --force out."
        ) from error


def _how_to_go_on(run: RunDirectory) -> str:
    return "" if run.state.status == "finished" else f" To go on: millrace resume {run.path}"
