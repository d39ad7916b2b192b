"""The training loop: batches in, steps run, results looked at, checkpoints left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from millrace.data.batches import Batches
from millrace.errors import NonFiniteError
from millrace.graph.graph import TRAIN, Graph, info, spec_of
from millrace.graph.training import STEP
from millrace.runtime.checkpoint import VARIABLES, Checkpoint, Checkpoints
from millrace.runtime.commit import Digest
from millrace.runtime.save_nodes import SAVE
from millrace.runtime.session import Session
from millrace.runtime.shard import verify
from millrace.train.callbacks import CallbackList
from millrace.train.early_stopping import StoppingState
from millrace.train.evaluation import Evaluator, examples_in
from millrace.train.events import EventWriter, NodeView
from millrace.train.interrupt import Interruptible
from millrace.train.metrics import RunningMeans
from millrace.train.nonfinite import explain_nonfinite
from millrace.train.plan import Plan
from millrace.train.progress import Progress
from millrace.train.result import Result
from millrace.train.run_directory import RunDirectory
from millrace.train.run_state import Outcome

MakeGraph = Callable[[Any], Graph]


class Trainer:
    """One run. `fit` builds it and calls `run` once."""

    def __init__(
        self,
        plan: Plan,
        make_graph: MakeGraph,
        batches: Batches,
        *,
        validation: Batches | None,
        evaluator: Evaluator,
        callbacks: CallbackList,
        run: RunDirectory | None,
        progress: Progress,
        started_s: float,
    ) -> None:
        self.plan = plan
        self.directory: Path | None = run.path if run else None
        self.step = 0
        self._make_graph = make_graph
        self._batches = batches
        self._validation = validation
        self._evaluator = evaluator
        self._callbacks = callbacks
        self._run = run
        self._progress = progress
        self._events: EventWriter | None = None
        self._checkpoints: Checkpoints | None = None
        self._session: Session | None = None
        self._started_s = started_s
        self._stop = False
        self._stopping = StoppingState()
        self._means = RunningMeans()
        self._fetches: list[str] = []
        self._result = Result("finished", 0, 0, run_dir=self.directory)
        self._saved_step = self._evaluated_step = -1
        self._start_position = batches.position()
        self._resumed: Checkpoint | None = None

    def stop(self) -> None:
        """End after the present step, as finished (callbacks call this)."""
        self._stop = True

    def run(self) -> Result:
        """Train until the plan is done, something asks to stop, or an error ends it."""
        loop_start_s = time.monotonic()
        outcome: Outcome = "failed"
        interrupted = None
        try:
            with self._progress, Interruptible() as interruptible:
                for calls in self._calls():
                    self._take(calls)
                    if interruptible.asked is not None:
                        interrupted = interruptible.asked
                        break
                    if self._stop:
                        break
                if self._session is None:
                    self._begin_without_steps()
                self._finish_epoch_work(interrupted is None)
                outcome = "finished" if interrupted is None else "interrupted"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            self._close(outcome)
        if interrupted is not None:
            where = f"; resume with run_dir={str(self.directory)!r}, resume=True" if self.directory else ""
            raise KeyboardInterrupt(f"{interrupted.name} after step {self.step}: saved{where}")
        return replace(
            self._result,
            outcome=outcome,
            steps=self.step,
            epochs=self._batches.epoch,
            train_s=time.monotonic() - loop_start_s,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def _calls(self) -> Iterator[list[Any]]:
        """Batches, `steps_per_call` at a time (fewer at the end, or where their shapes change)."""
        self._open_checkpoints()
        group: list[Any] = []
        for batch in self._batches.until(batches=self.plan.steps, epochs=self.plan.epochs):
            if group and _shapes(batch) != _shapes(group[0]):
                yield group
                group = []
            group.append(batch)
            if len(group) == self.plan.steps_per_call or self.step == 0 or self._epoch_boundary_next():
                yield group
                group = []
        if group:
            yield group

    def _epoch_boundary_next(self) -> bool:
        """Whether evaluation or a checkpoint may fall due after the batch in hand, so that a call must end here."""
        per_epoch = self._batches.batches_per_epoch
        due = [n for n in (self.plan.evaluate_every, self.plan.checkpoint_every) if n]
        done = self._batches.handed_out
        return any(done % n == 0 for n in due) or (per_epoch is not None and done % per_epoch == 0)

    def _take(self, calls: list[Any]) -> None:
        """Run one call's steps and everything that falls due after it."""
        first = self._session is None
        session = self._session or self._begin(calls[0])
        fetches = [TRAIN, *self._fetches]
        if len(calls) == 1:
            values = [v.unsqueeze(0) for v in session.run(fetches, calls[0])[1:]]
        else:
            values = session.run_steps(fetches, calls)[1:]
        if first and not self._result.first_step_s:
            self._result = replace(self._result, first_step_s=time.monotonic() - self._started_s)
        by_name = dict(zip(self._fetches, values, strict=True))
        examples = sum(examples_in(batch) for batch in calls)
        for index in range(len(calls)):
            self._after_step({name: value[index] for name, value in by_name.items()}, calls)
        last = {name: value[-1] for name, value in by_name.items()}
        self._progress.update(self.step, last, examples=examples, epoch=self._batches.epoch + 1)
        self._after_call()

    def _after_step(self, values: Mapping[str, Tensor], calls: Sequence[Any]) -> None:
        self.step += 1
        self._means.update(values)
        self._check_finite(values, calls)
        if self.step % self.plan.log_every == 0:
            self._log()
        self._callbacks.on_step(self, self.step, values)

    def _after_call(self) -> None:
        if self._batches.handed_out != self.step:
            return  # a batch of another shape was read ahead; what is due waits for its step
        epoch_ended = self._at_epoch_end()
        if self._validation is not None and self._due(self.plan.evaluate_every, epoch_ended):
            self._evaluate()
        if self._run is not None and self._due(self.plan.checkpoint_every, epoch_ended):
            self._save()

    def _at_epoch_end(self) -> bool:
        per_epoch = self._batches.batches_per_epoch
        return per_epoch is not None and self._batches.handed_out % per_epoch == 0

    def _due(self, every: int | None, epoch_ended: bool) -> bool:
        return epoch_ended if every is None else self.step % every == 0

    def _finish_epoch_work(self, complete: bool) -> None:
        """Evaluate and save once more at the end, unless that has just been done."""
        if complete and self._validation is not None and self._evaluated_step != self.step:
            self._evaluate()
        if self._run is not None and self._saved_step != self.step:
            self._save()
        if self._checkpoints is not None:
            self._checkpoints.wait()

    # -- beginning and ending ------------------------------------------------------------------------------------

    def _begin(self, batch: Any) -> Session:
        graph = self._make_graph(batch)
        self._session = session = Session(graph, compile=self.plan.compile, say=self._progress.message)
        self._fetches = [name for name in graph.fetches if not name.startswith("gradient/")]
        if self._resumed is not None:
            session.restore(self._resumed.path / VARIABLES)
        if self._run is not None:
            self._events = EventWriter(self._run.events, resume_step=self.step if self._resumed else None)
            if self._resumed is None:
                self._events.graph(node_views(graph))
        self._callbacks.on_start(self)
        if self._checkpoints is not None and self._resumed is None:
            self._save()  # a NaN in the first epoch is explained from here
        return session

    def _open_checkpoints(self) -> None:
        """Open the run's checkpoints and, to resume, go to the newest good one's place in the data.

        Its variables follow once the graph exists, which needs a batch.
        """
        if self._run is None:
            return
        self._checkpoints = Checkpoints(
            self._run.checkpoints,
            keep_last=self.plan.keep_last,
            keep_best=self.plan.keep_best if self._validation is not None else 0,
            best=self.plan.mode,
            write=self._write,
            read=_only_verify,
        )
        if not self.plan.resume:
            return
        self._resumed = found = self._checkpoints.load()
        self._batches.seek(found.extra["position"])  # type: ignore[arg-type]
        self._stopping = StoppingState.from_json(found.extra["early_stopping"])  # type: ignore[arg-type]
        self.step = self._saved_step = found.step
        self._checkpoints.rewind(found.step)
        self._run.rewind(found.step)
        self._progress.message(f"resumed {self._run.path} at step {found.step}")

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        assert self._session is not None
        return self._session.side(SAVE).write(path, tensors)

    def _begin_without_steps(self) -> None:
        """A resumed run that had reached its end: nothing is left to do, but its weights are wanted all the same."""
        one = self._batches.one_pass()
        self._begin(next(one))
        self._evaluated_step = self.step if self._validation is None else -1

    def _close(self, outcome: Outcome) -> None:
        self._batches.close()
        if self._session is not None:
            self._result = replace(self._result, tier=self._session.last_tier)
            self._callbacks.on_end(self, outcome)
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.close(outcome, self.step)

    # -- what falls due ------------------------------------------------------------------------------------------

    def _log(self) -> None:
        values = self._means.read()
        self._means.reset()
        self._result = replace(self._result, values=values)
        if self._run is not None:
            self._run.log(self.step, values)
        if self._events is not None:
            self._events.scalars(self.step, {f"train/{name}": value for name, value in values.items()})

    def _evaluate(self) -> None:
        assert self._validation is not None
        self._evaluated_step = self.step
        values = self._evaluator.means(self._validation.one_pass())
        self._result = replace(self._result, evaluation=values)
        named = {f"validation/{name}": value for name, value in values.items()}
        if self._run is not None:
            self._run.log(self.step, named)
        if self._events is not None:
            self._events.scalars(self.step, named)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.message(f"step {self.step}: validation {shown}")
        self._callbacks.on_evaluate(self, self.step, values)
        if self.plan.early_stopping is not None:
            rule = self.plan.early_stopping
            decision = rule.observe(self._stopping, rule.value_in(values), self.step)
            self._stopping = decision.state
            if decision.stop:
                self._progress.message(
                    f"stopping early at step {self.step}: {rule.metric} has not improved since step "
                    f"{decision.state.best_step}"
                )
                self._stop = True

    def _save(self) -> None:
        assert self._checkpoints is not None and self._session is not None and self._run is not None
        metric = self._result.evaluation.get(self.plan.monitor) if self._evaluated_step == self.step else None
        self._checkpoints.save(
            self.step,
            self._session.variables,
            {"position": self._position(), "early_stopping": self._stopping.to_json()},
            metric,
        )
        self._saved_step = self.step
        self._run.mark(self.step)
        self._callbacks.on_checkpoint(self, self.step, self._run.checkpoints / f"step-{self.step:08d}")

    def _position(self) -> dict[str, Any]:
        return self._batches.position() if self.step else self._start_position
    def _check_finite(self, values: Mapping[str, Tensor], calls: Sequence[Any]) -> None:
        loss = values["loss"]
        # Reading a loss waits for a GPU; there it is looked at when it is logged.
        if loss.device.type != "cpu" and self.step % self.plan.log_every:
            return
        if bool(torch.isfinite(loss)):
            return
        assert self._session is not None
        raise NonFiniteError(
            explain_nonfinite(self._session, self._checkpoints, self._batches, self.step, float(loss), calls)
        )


def _only_verify(path: Path, expected: Digest | None) -> dict[str, Tensor]:
    """Whether a checkpoint's variables are whole; the session's restore node reads them."""
    if expected is not None:
        verify(path, expected)
    return {}


def node_views(graph: Graph) -> Iterator[NodeView]:
    """The graph's nodes for TensorBoard's graph page."""
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        spec, origin = spec_of(node), info(node)
        yield NodeView(
            name=node.name,
            op=str(node.target) if node.op == "call_function" else node.op,
            inputs=tuple(n.name for n in node.all_input_nodes),
            scope=origin.scope or origin.variable.replace("*", ""),
            phase=str(origin.phase) if node.op == "call_function" else "forward",
            shape=spec.shape if spec else None,
            dtype=str(spec.dtype) if spec else None,
            device=spec.device if spec else None,
        )


def _shapes(batch: Any) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(batch)]
