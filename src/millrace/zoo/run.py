"""A task's runs: train one, go on with one, and open what one has left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from millrace.data.batches import Json
from millrace.data.images import write_png
from millrace.errors import CheckpointError, RunDirectoryError, SettingError
from millrace.graph.graph import Graph
from millrace.graph.passes.splitting.split import joined
from millrace.graph.training import training_graph
from millrace.optim.average import averages_in
from millrace.replicas.settings import Update
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.callbacks import Callback
from millrace.train.fit import fit
from millrace.train.plan import Devices
from millrace.train.result import Result
from millrace.train.run_directory import RunDirectory
from millrace.train.run_files import encode_json, write_atomically
from millrace.zoo.base import Facts, Task, TaskData
from millrace.zoo.registry import load
from millrace.zoo.settings import (
    Settings,
    parse_settings,
    refuse_changes_on_resume,
    settings_from_json,
    settings_to_json,
)

RUNS = Path("runs")
RESULT = "result.json"
PICTURES = "pictures"
SPARES = 1  # processes that stand by, of a run with replicas


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    result: Result
    test: Mapping[str, float]  # loss and metrics on the data that training never saw
    report: str

    def summary(self, task: str) -> dict[str, Json]:
        """Everything in figures, as kept in result.json: "test_accuracy", "steps", "train_s", "run_dir", …"""
        result = self.result
        return {
            "task": task,
            **{f"test_{name}": value for name, value in self.test.items()},
            **{f"validation_{name}": value for name, value in result.evaluation.items()},
            "steps": result.steps,
            "epochs": result.epochs,
            "train_s": round(result.train_s, 3),
            "first_step_s": round(result.first_step_s, 3),
            "tier": result.tier,
            "run_dir": str(result.run_dir),
        }


@dataclass(frozen=True)
class Division:
    """Over what a run is divided: see `fit`. devices, replicas: None for both trains in this process."""

    devices: Devices | None = None
    placement: Mapping[str, str] | None = None
    microbatches: int = 1
    time_chunks: int = 1
    partitions: int = 1
    wire: str | None = None
    replicas: int | None = None
    update: str | Update = "sync"
    parameter_servers: int | None = None
    backup: int | None = None
    cluster: str | None = None
    spares: int = SPARES
    chaos_s: float | None = None
    room_within_s: float = 30.0

    @property
    def has_processes(self) -> bool:
        """Whether it computes in other processes than this one."""
        return self.devices is not None or self.replicas is not None


@dataclass(frozen=True)
class Opened:
    """A trained model, as its run directory has it."""

    task: Task[Any]
    model: nn.Module  # in evaluation mode
    facts: Facts
    step: int
    path: Path


def configure(name: str, assignments: Sequence[str]) -> Task[Any]:
    """A task by its name, with settings from texts such as "epochs=3".

    Raises:
        SettingError: an unknown task or setting (with the near names), or a value that does not fit.
    """
    task = load(name)
    return task(parse_settings(task.settings_type(), assignments))


def configure_again(run: RunDirectory, assignments: Sequence[str] = ()) -> Task[Any]:
    """The task of a run that is there, with the settings it was started with, and harmless changes to them.

    Raises:
        SettingError: a change that a run cannot make half-way.
        RunDirectoryError: the run is not a task's.
    """
    config = run.config
    if "task" not in config or "settings" not in config:
        raise RunDirectoryError(
            f"{run.path} is no run of a task: its config.json lacks 'task' or 'settings', as after fit(…) in Python. "
            "Go on with it from there: fit(…, run_dir=…, resume=True)."
        )
    task = load(str(config["task"]))
    before: Settings = settings_from_json(task.settings_type, config["settings"])
    after = parse_settings(before, assignments)
    refuse_changes_on_resume(before, after)
    return task(after)


def train(
    task: Task[Any],
    *,
    device: str | None = None,
    run_dir: str | Path | bool = True,
    resume: RunDirectory | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    division: Division = Division(),
    arguments: Sequence[str] = (),
) -> Finished:
    """Train a task, evaluate it on its test data, and leave result.json in the run directory.

    Args:
        task: from `configure`, or `configure_again` to resume.
        device: such as "cuda"; None takes CUDA where there is one.
        run_dir: a new run's own directory; True makes one under runs/.
        resume: the run to go on with, instead.
        progress: show how far it is, on stderr.
        callbacks: beside the task's own.
        division: over several devices; `device` is the CPU then, unless it is named.
        arguments: of the command line, to be kept in config.json for whoever resumes the run.

    Raises: as `millrace.train.fit.fit`.
    """
    settings = task.settings
    device = checked_device("cpu" if device is None and division.has_processes else device)
    data = task.data(None if resume is None else resume.config.get("facts"))
    torch.manual_seed(settings.seed)
    model = task.model(data.facts)
    if resume is None:
        task.warm_start(model)
    config = {"task": task.name(), "settings": settings_to_json(settings), "facts": data.facts, "device": device}
    config["arguments"] = list(arguments)
    with _threads(settings.threads):
        result = fit(
            model,
            data.train,
            loss=task.loss,
            optimizer=task.optimizer(model, total_steps(settings, data)),
            validation=data.validation,
            callbacks=[*task.callbacks(model, data), *callbacks],
            device=device,
            config=config,
            monitor=task.monitor or task.metric,
            mode="min" if task.monitor == "loss" else task.better,
            run_dir=run_dir if resume is None else resume.path,
            resume=resume is not None,
            progress=progress,
            devices=division.devices,
            placement=division.placement,
            microbatches=division.microbatches,
            time_chunks=division.time_chunks,
            partitions=division.partitions,
            wire=division.wire,
            replicas=division.replicas,
            update=division.update,
            parameter_servers=division.parameter_servers,
            backup=division.backup,
            cluster=division.cluster,
            chaos_s=division.chaos_s,
            room_within_s=division.room_within_s,
            spares=division.spares,
            **_fit_settings(settings),
        )
        model.eval()
        finished = Finished(result, task.evaluate(model, data.test), task.report(model, data))
        pictures = {} if result.run_dir is None else task.pictures(model, data)
    if result.run_dir is not None:
        for name, picture in pictures.items():
            write_png(picture, result.run_dir / PICTURES / f"{name}.png")
        write_atomically(result.run_dir / RESULT, encode_json(finished.summary(task.name())))
    return finished


def step_graph(task: Task[Any]) -> Graph:
    """The graph of one training step of a task, as `train` would run it on a CPU."""
    data = task.data()
    torch.manual_seed(task.settings.seed)
    model = task.model(data.facts)
    model.train()
    batch = next(iter(data.train))
    data.train.close()
    optimizer = task.optimizer(model, total_steps(task.settings, data))
    return training_graph(model, task.loss, optimizer, batch, precision=task.settings.precision)


def find_run(name: str) -> RunDirectory:
    """The run that a person means: a path, a name under runs/, or "latest".

    Raises:
        SettingError: there is none; the message suggests the near names.
    """
    try:
        return RunDirectory.find(name, RUNS)
    except RunDirectoryError as error:
        raise SettingError(str(error)) from error


def open_run(run: RunDirectory, device: str | None = None) -> Opened:
    """The model of a run with the weights of its newest good checkpoint; the run may still be going on.

    Raises:
        CheckpointError: there is none, or it is of another model.
        RunDirectoryError: the run is not a task's.
    """
    task = configure_again(run)
    facts = run.config.get("facts", {})
    model = task.model(facts)
    checkpoint = Checkpoints(run.checkpoints).load()
    _fill(model, checkpoint.tensors, checkpoint.path)
    model.to(checked_device(device))
    return Opened(task, model.eval(), facts, checkpoint.step, run.path)


def test_values(opened: Opened) -> dict[str, float]:
    """Loss and metrics of an opened run's model on the test data."""
    return opened.task.evaluate(opened.model, opened.task.data(opened.facts).test)


def checked_device(name: str | None) -> str:
    """The device to use: the one named, or else CUDA where there is one.

    Raises:
        SettingError: this machine, or this torch, has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise SettingError(f"The device {name!r} cannot be used: {reason}. Name another, such as cpu.") from error
    return name


def total_steps(settings: Settings, data: TaskData) -> int:
    """How many steps the settings ask for.

    Raises:
        SettingError: they set no end, or count epochs of data that has none.
    """
    per_epoch = data.train.batches_per_epoch
    by_epochs = settings.epochs * per_epoch if settings.epochs and per_epoch else None
    asked = [steps for steps in (settings.steps, by_epochs) if steps is not None]
    if not asked:
        raise SettingError("The run needs an end: set steps or epochs (--set steps=1000); both are none now.")
    return min(asked)


def _fit_settings(settings: Settings) -> dict[str, Any]:
    """The settings that are `fit`'s own."""
    others = ("batch_size", "threads")
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name not in others}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within, torch uses so many threads of the CPU; None leaves it to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's variables into a module's tensors of the same names: blocks put together, averages first."""
    tensors = joined(tensors)
    averages = averages_in(tensors)
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        saved = averages.get(name, tensors.get(name))
        if saved is None or saved.shape != own.shape:
            got = "nothing" if saved is None else f"shape {list(saved.shape)}"
            raise CheckpointError(
                f"The checkpoint {path} does not fit the model: {name!r} has shape {list(own.shape)} there, and the "
                f"checkpoint has {got}. Use the version of the task that the run was made with (environment.json)."
            )
        own.data.copy_(saved)
