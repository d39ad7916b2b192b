"""`millrace train`: train a task, or go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from millrace.cli.arguments import RUN_HELP, add_device, add_json, add_settings, parser, print_json
from millrace.cli.placing import add_dividing, devices_of, wishes
from millrace.errors import MillraceError, SettingError
from millrace.place.cluster_file import read_cluster
from millrace.replicas.settings import Hybrid
from millrace.train.callbacks import Callback, RunView
from millrace.train.devices import PICTURE, TIMELINE
from millrace.train.run_directory import RunDirectory
from millrace.zoo.base import Task
from millrace.zoo.registry import check_name
from millrace.zoo.run import SPARES, Division, Finished, configure, configure_again, find_run, train

_DESCRIPTION = """\
Train a task of the zoo, or go on with a run that was interrupted, was killed, or is to get longer.

While it runs, the progress is on standard error; Ctrl-C saves the run and says how to go on. At the end the model is
evaluated on test data that training never saw."""

_EXAMPLES = """
millrace train digits
millrace train digits --set epochs=5 --set seed=1 --json
millrace train chars --device cuda --set precision=bfloat16
millrace train chars --devices 2 --microbatches 4        over two worker processes of this machine
millrace train digits --replicas 4 --chaos 3             four replicas, one of which is killed every 3 seconds
millrace train digits --replicas 4 --cluster local       the same number on a Ray cluster, here a local one
millrace train --resume latest --replicas 2              go on over others; over the same: millrace resume latest"""


def main(arguments: list[str]) -> None:
    """Parse, train, print."""
    given = parsed(arguments)
    resumed = None if given.resume is None else find_run(given.resume)
    task = _task(given.task, given.assignments, resumed)
    watcher = _Watcher(quiet=given.quiet)
    try:
        finished = train(
            task,
            device=given.device,
            run_dir=given.run_dir or True,
            resume=resumed,
            progress=not given.quiet,
            callbacks=[watcher],
            division=_division(given),
            arguments=kept_arguments(given),
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(watcher.interrupted()) from interrupt
    except MillraceError as error:
        if watcher.directory is not None:
            error.add_note(f"The run is in {watcher.directory}; to go on from its last checkpoint: {watcher.command()}")
        raise
    _print(finished, task.metric, watcher)
    if given.json:
        print_json(finished.summary(task.name()))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The arguments, which fit together. Exits where they do not."""
    options = parser("train", _DESCRIPTION, _EXAMPLES)
    options.add_argument("task", nargs="?", metavar="TASK", help="one of `millrace tasks`; left out with --resume")
    add_settings(options)
    options.add_argument("--resume", metavar="RUN", help=f"go on with {RUN_HELP}")
    options.add_argument("--run-dir", metavar="DIR", help="the run's own directory (default: a new one under runs/)")
    add_device(options)
    options.add_argument(
        "--devices",
        type=devices_of,
        metavar="N",
        help="train over N CPU workers here, or gpu:0,cpu:0, or all; with --replicas gpu: a GPU for each",
    )
    options.add_argument(
        "--cluster",
        metavar="WHERE",
        help="or over those in a cluster file; with --replicas: Ray, local or its address",
    )
    options.add_argument("--replicas", type=int, metavar="N", help="train in N processes, each with a slice of a batch")
    options.add_argument(
        "--update",
        metavar="WAY",
        help="how they agree: sync, async, hybrid, local_steps (sync; of a resumed run: its own)",
    )
    options.add_argument(
        "--room-within", type=float, metavar="SECONDS", help="how long a cluster may take to find room for them (30)"
    )
    options.add_argument("--groups", type=int, metavar="N", help="--update hybrid: so many groups of --replicas each")
    options.add_argument(
        "--parameter-servers", type=int, metavar="N", help="so many processes hold the variables (sync: 0, else 1)"
    )
    options.add_argument("--backup", type=int, metavar="N", help="so many replicas more than an update waits for (0)")
    options.add_argument("--spares", type=int, metavar="N", help=f"so many more processes stand by ({SPARES})")
    options.add_argument("--chaos", type=float, metavar="SECONDS", help="kill one of the processes every so often")
    add_dividing(options)
    add_json(options)
    options.add_argument("--quiet", action="store_true", help="show no progress")
    given = options.parse_args(arguments)
    if given.resume is None and given.task is None:
        options.error("a TASK is needed (`millrace tasks` lists them), or --resume RUN")
    if given.resume is not None and given.run_dir is not None:
        options.error("--run-dir is for new runs; --resume RUN goes on in RUN")
    of_replicas = {given.parameter_servers, given.backup, given.spares, given.chaos, given.room_within} - {None}
    if given.replicas is None and (given.update not in (None, "sync") or of_replicas):
        options.error(
            "--update, --parameter-servers, --backup, --spares, --chaos and --room-within are for replicas: give "
            "--replicas N"
        )
    if given.replicas is None and given.devices is not None and given.cluster is not None:
        options.error("--devices N makes workers of this machine, --cluster FILE lists them: give one of the two")
    if given.replicas is None and given.cluster is not None and not Path(given.cluster).exists():
        options.error(
            f"--cluster {given.cluster}: there is no such cluster file. To train on a Ray cluster say over how many "
            f"processes, by --replicas N; to have the whole run there: millrace submit … --cluster {given.cluster}"
        )
    if given.update is None:
        again = given.resume is not None and given.replicas is not None
        given.update = _kept(given.resume, "--update", "sync") if again else "sync"
        if given.update == "hybrid" and given.groups is None:
            given.groups = int(_kept(given.resume, "--groups", str(Hybrid().groups)))
        for name in ("parameter_servers", "backup", "spares") if again else ():
            kept = _kept(given.resume, f"--{name.replace('_', '-')}", "")
            if kept and getattr(given, name) is None:
                setattr(given, name, int(kept))
    if given.groups is not None and given.update != "hybrid":
        options.error("--groups N is for --update hybrid")
    no_devices = given.devices is None and (given.cluster is None or given.replicas is not None)
    wire = given.wire and given.replicas is None  # what replicas say to each other can be narrowed, too
    if no_devices and (given.on or wire or given.microbatches > 1 or given.time_chunks > 1):
        others = " or --cluster FILE" if given.replicas is None else ""
        options.error(
            f"--on, --wire, --microbatches and --time-chunks are for several devices: give --devices N{others}"
        )
    return given


def _kept(run: str, option: str, default: str) -> str:
    """What a run was last given for an option."""
    arguments = list(find_run(run).config.get("arguments", []))
    return str(arguments[arguments.index(option) + 1]) if option in arguments else default


def _division(given: argparse.Namespace) -> Division:
    several = given.cluster is not None and given.replicas is None
    return Division(
        devices=read_cluster(Path(given.cluster)) if several else given.devices,
        placement=wishes(given.on) or None,
        microbatches=given.microbatches,
        time_chunks=given.time_chunks,
        partitions=given.partitions,
        wire=given.wire,
        replicas=given.replicas,
        update=way_said(given),
        parameter_servers=given.parameter_servers,
        backup=given.backup,
        cluster=None if several else given.cluster,
        chaos_s=given.chaos,
        **({} if given.room_within is None else {"room_within_s": given.room_within}),
        **({} if given.spares is None else {"spares": given.spares}),
    )


def way_said(given: argparse.Namespace) -> str | Hybrid:
    """How replicas are to agree."""
    way: str = given.update
    return way if given.groups is None else Hybrid(given.groups)


def kept_arguments(given: argparse.Namespace) -> list[str]:
    """The arguments that a run needs again when it goes on."""
    found = []
    defaults: dict[str, Any] = {
        "device": None,
        "devices": None,
        "cluster": None,
        "microbatches": 1,
        "time_chunks": 1,
        "partitions": 1,
        "wire": None,
    }
    defaults |= {"replicas": None, "update": "sync", "groups": None, "room_within": None}
    defaults |= {"parameter_servers": None, "backup": None, "spares": None}
    for name, default in defaults.items():
        if getattr(given, name) != default:
            value = getattr(given, name)
            found += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    for wish in given.on:
        found += ["--on", wish]
    return found


def _task(name: str | None, assignments: list[str], resumed: RunDirectory | None) -> Task[Any]:
    if name is not None:
        check_name(name)
    if resumed is None:
        return configure(str(name), assignments)
    task = configure_again(resumed, assignments)
    if name not in (None, task.name()):
        raise SettingError(f"{resumed.path} is a run of {task.name()!r}, not of {name!r}: leave the task out.")
    return task


def division_arguments(kept: list[str]) -> list[str]:
    """Of the arguments that a run needs again, those that hold wherever it runs."""
    if "--cluster" not in kept:
        return kept
    at = kept.index("--cluster")
    return kept[:at] + kept[at + 2 :]


class _Watcher(Callback):
    """Says where the run is when it begins, and remembers what to say when it ends."""

    def __init__(self, quiet: bool) -> None:
        self.directory: Path | None = None
        self.first_step = 0  # steps done before
        self.saved_step: int | None = None
        self._quiet = quiet

    def on_start(self, run: RunView) -> None:
        self.directory, self.first_step = run.directory, run.step
        if not self._quiet:
            print(f"run directory: {run.directory}", file=sys.stderr)

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        self.saved_step = step

    def command(self) -> str:
        """What goes on with the run."""
        return f"millrace resume {shlex.quote(str(self.directory))}"

    def interrupted(self) -> str:
        """What to say after Ctrl-C."""
        if self.directory is None:
            return "interrupted before the first step; nothing was trained"
        if self.saved_step is None:
            return f"interrupted; to go on from the last checkpoint:\n  {self.command()}"
        return f"interrupted; the run is saved at step {self.saved_step}. To go on:\n  {self.command()}"


def _print(finished: Finished, metric: str, watcher: _Watcher) -> None:
    result, before = finished.result, watcher.first_step
    if finished.report:
        print(finished.report)
    others = ", ".join(f"{name} {value:.4g}" for name, value in finished.test.items() if name != metric)
    print(f"test {metric.replace('_', ' ')} {finished.test[metric]:.4f}" + (f" ({others})" if others else ""))
    if before and result.steps == before:
        longer = f"{watcher.command()} --set steps=… or epochs=…"
        print(f"the run had reached its end before, at step {before}. To train it longer: {longer}")
    else:
        sofar = f" after the first {before}" if before else ""
        print(f"{result.steps - before} steps{sofar} in {result.train_s:.1f} s; the run is in {result.run_dir}")
    if result.run_dir is not None and (result.run_dir / TIMELINE).exists():
        print(f"which device did what: {PICTURE} there; when: {TIMELINE}, to be opened at ui.perfetto.dev")
