"""`millrace submit`: train a task on a cluster elsewhere."""

from __future__ import annotations

import argparse
import sys
import time

from millrace.cli.arguments import add_json, parser, print_json
from millrace.cli.remote import add_python, follow
from millrace.cli.train import division_arguments, kept_arguments, parsed, way_said
from millrace.errors import SettingError
from millrace.replicas.settings import processes, with_servers
from millrace.runtime.jobs import Jobs, open_jobs
from millrace.train.plan import GPU
from millrace.zoo.run import SPARES, configure
from millrace.zoo.submitted import Asked, SubmittedRun, find_submitted, submit, why_waiting

_DESCRIPTION = """\
Train a task on a Ray cluster that runs elsewhere, or on this machine. This millrace's code goes along; the cluster has
PyTorch and what else the task needs. The run goes on when this command has ended: see it by
`millrace runs|logs|stop|resume … --cluster WHERE`. Takes all settings of `millrace train TASK`, --replicas among them.

Runs share a cluster by what they reserve: --cpus and --gpus for the process that reads the data (and trains, without
replicas), and for every process of the replicas one core, with `--devices gpu` a GPU, too. Who finds no room waits; who
never would is refused."""
_EXAMPLES = """
millrace submit digits --cluster http://10.0.0.5:8265 --set epochs=5
millrace submit digits --cluster ray://10.0.0.5:10001 --replicas 4 --follow
millrace submit chars --cluster local --cpus 4 --runs-dir /shared/runs"""
_RUNS = "~/millrace-runs"
_NOT_HERE = ("resume", "run_dir", "json", "quiet")
_STARTS_WITHIN_S = 20.0
_LOOK_S = 0.5
_FOR_ROOM_S = 900


def main(arguments: list[str]) -> int:
    """Parse, hand in, and see it start."""
    options = _options()
    given, rest = options.parse_known_args(arguments)
    training = parsed(rest)
    for name in _NOT_HERE:
        if getattr(training, name):
            options.error(f"--{name.replace('_', '-')} is not for submitted runs; see --help")
    if training.devices not in (None, [GPU]) or (training.devices and training.replicas is None):
        options.error("--devices of a submitted run is gpu, with --replicas: a GPU for each; see --help")
    configure(training.task, training.assignments)  # a wrong name is found here, not on the cluster
    asked = asked_for(given, training)
    jobs = open_jobs(given.cluster)
    settings = [word for text in training.assignments for word in ("--set", text)]
    if training.chaos:
        settings += ["--chaos", f"{training.chaos:g}"]
    if asked.processes and training.room_within is None:
        training.room_within = _FOR_ROOM_S
    run = submit(
        jobs,
        training.task,
        settings,
        division_arguments(kept_arguments(training)),
        asked=asked,
        directory=given.runs_dir,
        python=given.python,
        may_grow=given.may_grow,
    )
    print(f"{run.name} was submitted to {jobs.address}; it asks for {asked}", file=sys.stderr)
    status = follow(jobs, run) if given.follow else _see_it_start(jobs, run)
    if given.json:
        print_json({"run": run.name, "cluster": jobs.address, "run_dir": run.directory})
    return status


def _options() -> argparse.ArgumentParser:
    options = parser("submit", _DESCRIPTION, _EXAMPLES)
    options.usage = "millrace submit TASK --cluster WHERE [options] [options of millrace train]"
    options.add_argument(
        "--cluster", required=True, metavar="WHERE", help="http://HOST:8265, ray://HOST:10001, HOST:6379 or local"
    )
    options.add_argument(
        "--runs-dir", default=_RUNS, metavar="DIR", help=f"where runs are kept, on the cluster's head ({_RUNS})"
    )
    options.add_argument("--cpus", type=float, default=1.0, metavar="N", help="cores for the run's own process (1)")
    options.add_argument("--gpus", type=float, default=0.0, metavar="N", help="GPUs for it (0)")
    options.add_argument("--may-grow", action="store_true", help="the cluster adds machines as they are needed")
    add_python(options)
    options.add_argument("--follow", action="store_true", help="print what the run says, until it ends")
    add_json(options)
    return options


def asked_for(given: argparse.Namespace, training: argparse.Namespace) -> Asked:
    """What the cluster is to have room for. given: this command's arguments. training: those of `millrace train`.

    Raises: SettingError for what no run can be.
    """
    if not (given.cpus >= 0 and given.gpus >= 0):
        raise SettingError(f"--cpus {given.cpus:g} --gpus {given.gpus:g}: expected numbers of at least 0")
    if training.replicas is None:
        return Asked(given.cpus, given.gpus)
    spares = SPARES if training.spares is None else training.spares
    update = with_servers(way_said(training), training.parameter_servers, training.backup)
    return Asked(given.cpus, given.gpus, processes(update, training.replicas, spares), training.devices == [GPU])


def _see_it_start(jobs: Jobs, run: SubmittedRun) -> int:
    """Wait until it runs, has failed, or evidently waits for room."""
    end_s = time.monotonic() + _STARTS_WITHIN_S
    while run.job.status == "waiting" and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
        run = find_submitted(jobs, run.name)
    if run.job.status == "failed":
        print(f"millrace submit: {run.name} failed: {run.job.message}", file=sys.stderr)
        return 1
    if run.job.status == "waiting":
        print(f"it waits: {why_waiting(jobs, run)}", file=sys.stderr)
    print(f"{run.name} is {run.state}. To see what it says: millrace logs {run.name} --cluster {jobs.address} --follow")
    return 0
