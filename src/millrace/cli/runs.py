"""`millrace runs`: which runs there are, and how each of them goes."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from millrace.cli.arguments import add_json, parser, print_json
from millrace.cli.remote import add_cluster
from millrace.cli.table import aligned
from millrace.errors import RunDirectoryError, WorkerError
from millrace.runtime.jobs import open_jobs
from millrace.train.progress import format_rate
from millrace.train.run_directory import RunDirectory
from millrace.train.run_summary import RunSummary, summarize
from millrace.zoo.run import RUNS
from millrace.zoo.submitted import submitted_runs, summarize_submitted

_DESCRIPTION = """\
List runs, the one that was started last at the end.

states: running; finished; interrupted (it was asked to stop, and has saved); failed (an error ended it: see its log);
killed (its process is gone, and could not say why); waiting (submitted to a cluster that has no room for it yet). All
but finished ones go on with `millrace resume RUN`."""
_EXAMPLES = """
millrace runs
millrace runs elsewhere/            those in another directory
millrace runs --last 5 --json
millrace runs --cluster http://10.0.0.5:8265      those submitted there"""
_Run = TypeVar("_Run")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def main(arguments: list[str]) -> None:
    """Parse, look, print."""
    options = parser("runs", _DESCRIPTION, _EXAMPLES)
    options.add_argument("directory", nargs="?", type=Path, default=RUNS, help=f"that holds the runs ({RUNS}/)")
    options.add_argument("--last", type=int, default=20, metavar="N", help="only the last N (20)")
    add_cluster(options)
    add_json(options)
    given = options.parse_args(arguments)
    if given.cluster is None:
        found = sorted(_readable(RunDirectory.all(given.directory), summarize), key=lambda run: run.started_s)
        shown, where = found[-given.last :] if given.last > 0 else [], f"under {given.directory}/"
        count, earlier = len(found), len(found) - len(shown)
    else:
        jobs = open_jobs(given.cluster)
        submitted = submitted_runs(jobs)
        latest = submitted[-given.last :] if given.last > 0 else []
        shown = _readable(latest, lambda run: summarize_submitted(jobs, run))
        count, earlier, where = len(submitted), len(submitted) - len(latest), f"known to {jobs.address}"
    _show(shown, count, earlier, where)
    if given.json:
        print_json({"runs": [dataclasses.asdict(run) | {"path": str(run.path)} for run in shown]})


def _show(shown: list[RunSummary], count: int, earlier: int, where: str) -> None:
    if shown:
        print(table(shown, time.time()))
    if earlier:
        print(f"and {earlier} earlier ones: --last {count} shows all", file=sys.stderr)
    if not count:
        print(f"no run is {where}; `millrace train TASK` starts one here, `millrace submit` elsewhere", file=sys.stderr)


def table(runs: list[RunSummary], now_s: float) -> str:
    """Runs in aligned columns; now_s: since the epoch."""
    rows = [["run", "state", "step", "loss", "steps/s", "started"]]
    for run in runs:
        loss = "-" if run.loss is None else f"{run.loss:.4g}"
        rate = "-" if run.steps_per_s is None else format_rate(run.steps_per_s)
        rows.append([run.name, run.status, str(run.step), loss, rate, ago(now_s - run.started_s)])
    return aligned(rows)


def ago(age_s: float) -> str:
    """A time in the past, in its largest unit."""
    for unit, size_s in _UNITS:
        if age_s >= size_s:
            return f"{age_s / size_s:.0f} {unit} ago"
    return f"{max(age_s, 0):.0f} s ago"


def _readable(runs: Iterable[_Run], summary_of: Callable[[_Run], RunSummary]) -> list[RunSummary]:
    """Of all runs that can be read; of the others it is said why not."""
    found = []
    for run in runs:
        try:
            found.append(summary_of(run))
        except (RunDirectoryError, WorkerError) as error:
            print(f"millrace runs: {error}", file=sys.stderr)
    return found
