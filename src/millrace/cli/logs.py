"""`millrace logs`: what a run has said, and what it says from now on."""

from __future__ import annotations

import time

from millrace.cli.arguments import RUN_HELP, parser
from millrace.cli.remote import add_cluster, follow
from millrace.runtime.jobs import Jobs, open_jobs
from millrace.train.run_directory import RunDirectory
from millrace.train.run_log import LogReader
from millrace.zoo.run import find_run
from millrace.zoo.submitted import find_submitted, log_of

_DESCRIPTION = "Print what a run has said: its loss now and then, evaluations, lost processes, and why it ended."
_EXAMPLES = """
millrace logs latest
millrace logs latest --follow
millrace logs latest --follow --cluster http://10.0.0.5:8265"""
_LOOK_S = 0.3


def main(arguments: list[str]) -> None:
    """Parse, print."""
    options = parser("logs", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    options.add_argument("--follow", action="store_true", help="go on until it ends; Ctrl-C leaves it alone")
    add_cluster(options)
    given = options.parse_args(arguments)
    if given.cluster is not None:
        _remote(open_jobs(given.cluster), given.run, given.follow)
        return
    run = find_run(given.run)
    if given.follow:
        _follow(run)
    else:
        _print_new(LogReader(run.log_path))


def _remote(jobs: Jobs, name: str, go_on: bool) -> None:
    run = find_submitted(jobs, name)
    if go_on:
        follow(jobs, run)
    else:
        print(log_of(jobs, run), end="")


def _follow(run: RunDirectory) -> None:
    log, running = LogReader(run.log_path), True
    while running:
        running = run.state.status == "running"  # looked at before the last lines are read
        _print_new(log)
        if running:
            time.sleep(_LOOK_S)


def _print_new(log: LogReader) -> None:
    for text in log.new():
        print(text, end="", flush=True)
