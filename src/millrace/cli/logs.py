"""`millrace logs`: what a run has said, and what it says from now on."""

from __future__ import annotations

import time

from millrace.cli.arguments import RUN_HELP, parser
from millrace.train.run_directory import RunDirectory
from millrace.train.run_log import LogReader
from millrace.zoo.run import find_run

_DESCRIPTION = "Print what a run has said: its loss now and then, evaluations, lost processes, and why it ended."
_EXAMPLES = """
millrace logs latest
millrace logs latest --follow"""
_LOOK_S = 0.3


def main(arguments: list[str]) -> None:
    """Parse, print."""
    options = parser("logs", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    options.add_argument("--follow", action="store_true", help="go on until it ends; Ctrl-C leaves it alone")
    given = options.parse_args(arguments)
    run = find_run(given.run)
    if given.follow:
        _follow(run)
    else:
        _print_new(LogReader(run.log_path))


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
