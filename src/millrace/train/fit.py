"""`fit`: train a module, on one machine, in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from millrace.compile.tiered import Say
from millrace.data.batches import START, Batches
from millrace.data.iterables import OnceBatches
from millrace.data.sources import as_batches
from millrace.errors import DataError, SettingError, did_you_mean
from millrace.graph.graph import Graph
from millrace.graph.passes.splitting.split import split
from millrace.graph.training import Loss, UpdateRule, training_graph
from millrace.optim.optimizer import Optimizer
from millrace.replicas.settings import LocalSteps, update_of
from millrace.runtime.session import Session
from millrace.train.callbacks import Callback, CallbackList
from millrace.train.devices import DeviceRun
from millrace.train.evaluation import Evaluator
from millrace.train.journal import Journal, sayer
from millrace.train.plan import Plan, PlanSettings
from millrace.train.progress import Progress
from millrace.train.replicas import ReplicaRun
from millrace.train.result import Result
from millrace.train.run_directory import RunDirectory
from millrace.train.saving import Place, Saver
from millrace.train.trainer import Trainer

_AnyOptimizer = torch.optim.Optimizer | UpdateRule


def fit(
    model: nn.Module,
    data: Any,
    *,
    loss: Loss,
    optimizer: torch.optim.Optimizer | UpdateRule,
    batch_size: int | None = None,
    validation: Any = None,
    callbacks: Iterable[Callback] = (),
    device: str | torch.device | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[PlanSettings],
) -> Result:
    """Train `model` in place; when this returns, it holds the trained weights.

    The step is traced once into a graph, runs eagerly at once and compiled as soon as Inductor is done. A run
    directory keeps settings, metrics, events for TensorBoard and checkpoints. Ctrl-C ends the run after the present
    step and saves; `resume=True` with the same `run_dir` goes on bit for bit, given the same model, data and optimizer;
    `seed`, `accumulate`, `precision` and `partitions` stay those of the run, all other settings may change.

    Args:
        model: any `nn.Module`.
        data: a DataLoader, tensors or arrays (alone or in a tuple or dict), a Dataset, a Hugging Face dataset, or any
            iterable of batches; see `millrace.data.as_batches`.
        loss: `loss(model, batch) -> scalar`, or `-> (scalar, {name: tensor})` with metrics.
        optimizer: any `torch.optim` optimizer over the model's parameters, or one of `millrace.optim`. Where that
            keeps averages of the parameters, these are what is evaluated, and what the model holds in the end.
        batch_size: examples per batch, where `data` comes as examples.
        validation: data to evaluate on, in the forms of `data`.
        callbacks: see `millrace.train.callbacks`.
        device: where to train; the model is moved there. None: where it is.
        config: anything else to keep in config.json.
        steps, epochs: when to stop; at least one of them.
        compile: "tiered" (default), "eager" or "inductor".
        precision: "float32" or "bfloat16" (autocast).
        schedule: step -> factor on the learning rates of a `torch.optim` optimizer (`millrace.optim` has its own).
        accumulate: update on the mean gradient of this many steps.
        partitions: divide wide layers into so many blocks (`graph.passes.splitting`), which all run on `device`.
        devices: what to divide the graph over, each a worker process of this machine: a number of CPU workers, names
            (["gpu:0", "gpu:1", "cpu:0"]), "all" for every GPU and a CPU worker, a `Cluster`, or a cluster file. None:
            train in this process. placement: wishes, such as {"encoder.*": "gpu:0"}; see `millrace.place.hints.Hints`.
            microbatches: into how many parts to divide each batch, so that the devices work at the same time.
            time_chunks: into how many parts of time to cut recurrent layers, for the same reason.
            transport: "shared_memory" or "gloo"; None: as the devices' hosts allow.
            wire: narrow what they send each other: "bfloat16", "int8", "zeros" (exact), or a mapping such as
            {"encoder.*": "int8"}; see docs/placement.md.
            With replicas, every replica is divided so; "gpu" gives each of them a GPU of its machine.
            The run directory then also has the placement and the timeline of a step: see `millrace.train.devices`.
        replicas: train in so many processes at once; processes may die. update: how they agree. "sync": each works at
            a slice of every batch, and the result is that of one process (up to rounding). "async": each works at a
            batch of its own and pushes gradients to parameter servers when they are ready. "local_steps": each trains
            alone for some steps. Or one of `millrace.replicas.settings` with more to say: Async(bound=4).
            parameter_servers: how many processes hold the variables; "sync" has none unless they are said here. backup:
            how many replicas more work than an update of "sync" waits for, over servers. transport, wire: how gradients
            that are added up travel; wire is "bfloat16" or None. cluster: where they run: None for processes of this
            machine, "local" or an address for Ray. room_within_s: how long Ray may take to find room for all. spares:
            how many more stand by. patience_s: how long one may show no progress (None: from the measured steps).
            drop_failing: replace a process in which the step failed, instead of ending with its error. imports: modules
            that they import first, for operators of your own. chaos_s: kill one every so many seconds, to see that
            nothing is lost. Of a run over servers the run directory also has staleness.json. See docs/replicas.md.
        steps_per_call: run this many steps in one compiled call (for small models).
        seed: of the data's order and of the step's random numbers (not of the model's initial weights).
        evaluate_every, checkpoint_every: in steps; by default at the end of every epoch.
        keep_last, keep_best, monitor, mode: which checkpoints stay; `monitor` is a name in the evaluation.
        early_stopping: an `EarlyStopping`.
        run_dir: True makes a new directory under runs/; a path names it; False writes nothing.
        resume: go on with the run in `run_dir`.
        log_every: steps between logged means. progress: show a progress bar.

    Returns: how it went.

    Raises: SettingError, DataError, TraceError before anything is trained; NonFiniteError naming the first bad node;
    KeyboardInterrupt after Ctrl-C, once everything is saved.
    """
    started_s = time.monotonic()
    given = _plan(settings)
    plan, optimizer = _agreed(given, optimizer, validated=validation is not None)
    batches = as_batches(data, batch_size=batch_size, seed=plan.seed)
    held_out = None if validation is None else _held_out(validation, batch_size)
    if device is not None:
        _move(model, optimizer, device)
    model.train()
    with _run_directory(plan, {**(config or {}), "fit": given.as_config()}) or nullcontext() as run:
        saver, resumed = _saver(plan, run, validated=held_out is not None)
        if resumed is not None or batches.handed_out:  # somebody may have looked at the batches before
            batches.seek(resumed[0].position if resumed is not None else START)
        progress = Progress(
            _total_steps(plan, batches.batches_per_epoch),
            first_step=resumed[0].step if resumed else 0,
            epochs=plan.epochs,
            enabled=plan.progress,
        )
        say = sayer(run, progress)
        evaluator = Evaluator(model, loss, precision=plan.precision, compile=plan.compile, say=say)
        elsewhere = _elsewhere(plan, say)
        places = elsewhere.places if isinstance(elsewhere, DeviceRun) else None
        trainer = Trainer(
            plan,
            lambda batch: _step(plan, model, loss, optimizer, batch),
            elsewhere.session if elsewhere else lambda graph: Session(graph, compile=plan.compile, say=say),
            batches,
            evaluate=None if held_out is None else lambda: evaluator.means(held_out.one_pass()),
            callbacks=CallbackList([*([elsewhere] if elsewhere else []), *callbacks]),
            journal=Journal(run, progress, log_every=plan.log_every, places=places),
            run=run,
            saver=saver,
            resumed=resumed,
            started_s=started_s,
        )
        with progress:
            result = trainer.run()
        return elsewhere.completed(result) if isinstance(elsewhere, ReplicaRun) else result


def _plan(settings: Mapping[str, Any]) -> Plan:
    known = list(Plan.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise SettingError(f"fit has no setting {name!r}. {did_you_mean(name, known)}")
    return Plan(**settings)


def _agreed(plan: Plan, optimizer: _AnyOptimizer, *, validated: bool) -> tuple[Plan, _AnyOptimizer]:
    """The plan and the optimizer, as they agree with each other, with the run that goes on and with the data.

    Raises: SettingError where they do not.
    """
    if plan.resume:
        plan.refuse_changes(RunDirectory.open(Path(str(plan.run_dir))).config.get("fit", {}))
    if isinstance(optimizer, Optimizer) and plan.accumulate > 1:
        optimizer, plan = replace(optimizer, accumulate=plan.accumulate), replace(plan, accumulate=1)
    if isinstance(optimizer, Optimizer) and plan.schedule is not None:
        raise SettingError("schedule is for torch.optim; give a millrace optimizer its schedule as learning_rate=…")
    if plan.early_stopping is not None and not validated:
        raise SettingError("early_stopping watches the evaluation: pass validation=…, the data to evaluate on")
    if isinstance(rule := update_of(plan.update), LocalSteps):
        plan = replace(plan, steps_per_call=rule.every)
    return plan, optimizer


def _step(plan: Plan, model: nn.Module, loss: Loss, optimizer: _AnyOptimizer, batch: Any) -> Graph:
    """One training step, traced for a batch."""
    graph = training_graph(
        model,
        loss,
        optimizer,
        batch,
        precision=plan.precision,
        schedule=plan.schedule,
        accumulate=plan.accumulate,
        seed=plan.seed,
    )
    return split(graph, plan.partitions)


def _elsewhere(plan: Plan, say: Say) -> DeviceRun | ReplicaRun | None:
    """Where the steps run, if not in this process."""
    if plan.replicas is not None:
        return ReplicaRun(plan, say)
    return None if plan.devices is None else DeviceRun(plan, say)


def _run_directory(plan: Plan, config: Mapping[str, Any]) -> RunDirectory | None:
    if plan.run_dir is False:
        return None
    if plan.run_dir is True:
        return RunDirectory.create(config=config)
    path = Path(plan.run_dir).resolve()
    return RunDirectory.create(path.parent, path.name, config, "resume" if plan.resume else "new")


def _held_out(validation: Any, batch_size: int | None) -> Batches:
    batches = as_batches(validation, batch_size=batch_size, shuffle=False, drop_last=False)
    if isinstance(batches, OnceBatches):
        raise DataError(
            f"validation is {batches.name}, which can be read only once, but every evaluation reads it whole. Give a "
            "list, a DataLoader, or a function that makes a fresh iterator."
        )
    return batches


def _saver(plan: Plan, run: RunDirectory | None, *, validated: bool) -> tuple[Saver | None, tuple[Place, Path] | None]:
    """The run's checkpoints, and where the newest one stood if the run is to go on."""
    if run is None:
        return None, None
    keep_best = plan.keep_best if validated else 0
    saver = Saver(run, keep_last=plan.keep_last, keep_best=keep_best, monitor=plan.monitor, mode=plan.mode)
    return saver, saver.newest() if plan.resume else None


def _total_steps(plan: Plan, per_epoch: int | None) -> int | None:
    by_epochs = plan.epochs * per_epoch if plan.epochs and per_epoch else None
    known = [n for n in (plan.steps, by_epochs) if n is not None]
    return min(known) if known else None


def _move(model: nn.Module, optimizer: Any, device: str | torch.device) -> None:
    """Move the model; `nn.Module.to` keeps the parameters' identity, which a torch optimizer relies on."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise SettingError(f"device={device!r}: the model cannot be moved there: {reason}") from error
    if isinstance(optimizer, torch.optim.Optimizer):
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.to(device)
