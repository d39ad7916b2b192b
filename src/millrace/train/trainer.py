"""The training loop: batches in, steps run, results looked at, checkpoints left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.data.batches import Batches
from millrace.errors import FeedError, MillraceError, NonFiniteError, SettingError, VariablesLostError
from millrace.graph.graph import TRAIN, Graph
from millrace.replicas.members_session import MembersSession
from millrace.runtime.remote_session import AnySession, RemoteSession
from millrace.train.averages import averaged, put_averages
from millrace.train.callbacks import CallbackList
from millrace.train.calls import grouped, stretch
from millrace.train.evaluation import examples_in
from millrace.train.interrupt import Interruptible
from millrace.train.journal import Journal
from millrace.train.nonfinite import explain_nonfinite, nonfinite_parameter
from millrace.train.plan import Plan
from millrace.train.replicas import told_of_idle
from millrace.train.restarts import Restarts
from millrace.train.result import Result
from millrace.train.run_directory import RunDirectory
from millrace.train.run_state import Outcome
from millrace.train.saving import Place, Saver
from millrace.train.stop_request import StopRequest

_LONGEST_UNSAVED_S = 600.0  # where no interval is given, an epoch that is long is saved within it, too


class Trainer:
    """One run. `fit` builds it and calls `run` once.

    make_graph: traces the step for a batch. make_session: gets the graph ready to run. evaluate: one evaluation, None
    without validation data. resumed: where to go on, and the file of the variables there; `batches` are at that place
    already.
    """

    def __init__(
        self,
        plan: Plan,
        make_graph: Callable[[Any], Graph],
        make_session: Callable[[Graph], AnySession],
        batches: Batches,
        *,
        evaluate: Callable[[], dict[str, float]] | None,
        callbacks: CallbackList,
        journal: Journal,
        run: RunDirectory | None,
        saver: Saver | None,
        resumed: tuple[Place, Path] | None,
        started_s: float,
    ) -> None:
        self.plan = plan
        self.directory: Path | None = run.path if run else None
        self._make_graph = make_graph
        self._make_session = make_session
        self._batches = batches
        self._evaluate_all = evaluate
        self._callbacks = callbacks
        self._journal = journal
        self._run = run
        self._saver = saver
        self._place = resumed[0] if resumed else Place(0, batches.position())
        self._restored = resumed[1] if resumed else None
        self._session: AnySession | None = None
        self._fetches: list[str] = []
        self._signals = Interruptible(
            StopRequest(self.directory), at_once=lambda: self._session is None, noted=self._tell_of_signal
        )
        self._stop = False
        self._in_stretch = self._pull_later = False
        self._data_error: Exception | None = None
        self._saving: list[tuple[int, Path]] = []  # begun, not yet announced to the callbacks
        self._restarts = Restarts()
        self._resized_to: int | None = None
        self._started_s = started_s
        self._first_step_s = 0.0

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self._place.step

    def stop(self) -> None:
        """End after the present step, as finished (callbacks call this)."""
        self._stop = True

    def pull(self) -> None:
        """Have the user's module hold the present weights, wherever they are trained.

        Where several batches are in work at once, these are finished first: the weights are there soon, not on return.
        """
        self._pull_later = self._in_stretch
        if self._session is not None and not self._pull_later:
            self._session.pull()

    def resize(self, replicas: int) -> None:
        """From the next step on, train in so many replicas; see `RunView.resize`."""
        session = self._session
        if not isinstance(session, MembersSession):
            raise SettingError(f"resize({replicas!r}) is for a run over replicas: start it with replicas=2, say")
        session.resize(replicas)
        if replicas != self._resized_to:
            self._journal.say(f"resized to {replicas} after step {self.step}")
            if not session.works_ahead and (text := told_of_idle(session.graph, replicas)):
                self._journal.say(text)
        self._resized_to = replicas

    def run(self) -> Result:
        """Train until the plan is done, something asks to stop, or an error ends it.

        Raises: KeyboardInterrupt once everything is saved after Ctrl-C or SIGTERM; NonFiniteError; whatever the data,
        the step, a callback or the disk raises.
        """
        loop_start_s = time.monotonic()
        outcome: Outcome = "failed"
        try:
            with self._signals:
                self._train_to_the_end()
            outcome = "finished" if self._signals.asked is None else "interrupted"
        except BaseException as error:
            outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if self._run is not None:
                self._run.note_error(error)
            if outcome == "interrupted" and self.directory is not None:
                where = f"run_dir={str(self.directory)!r}, resume=True"
                error.add_note(f"To go on from the last checkpoint: {where}")
            for problem in self._close(outcome):
                error.add_note(f"While the run was ended: {type(problem).__name__}: {problem}")
            raise
        for problem in self._close(outcome):
            raise problem
        if self._signals.asked is not None:
            where = f"; resume with run_dir={str(self.directory)!r}, resume=True" if self.directory else ""
            saved = f": saved{where}" if self.directory else ": nothing was saved (run_dir=False)"
            raise KeyboardInterrupt(f"{self._signals.asked} after step {self.step}{saved}")
        return Result(
            outcome,
            self.step,
            self._epochs_done(),
            values=self._journal.means,
            evaluation=self._place.evaluation,
            train_s=time.monotonic() - loop_start_s,
            first_step_s=self._first_step_s,
            tier=self._session.last_tier if self._session else "eager",
            run_dir=self.directory,
            restarts=self._restarts.count,
            lost_updates=self._restarts.lost_updates,
        )

    def _tell_of_signal(self, asked: str) -> None:
        after = "all is saved" if self.directory else "the run ends"
        self._journal.say(f"{asked}: what is in work is finished, then {after}; a second one ends it at once")

    # -- the loop ------------------------------------------------------------------------------------------------

    def _train_to_the_end(self) -> None:
        lost: VariablesLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._go_back(lost)
                self._train()
                self._finish()
                return
            except VariablesLostError as error:
                if error is lost:  # there is nothing to go back to
                    raise
                lost = error

    def _train(self) -> None:
        self._stop_if_stopped_early()
        while not self._over() and not self._complete():
            epoch = self._batches.epoch
            for calls in self._calls():
                try:
                    if isinstance(calls, list):
                        self._take(calls)
                    else:
                        self._take_stretch(calls)
                except FeedError as error:  # found before anything ran
                    self._save_before_failing(error)
                    raise
                self._do_what_is_due(epoch_ended=False)
                if self._over():
                    if self._batches.epoch > epoch:  # read to see whether the call could be longer; not again on resume
                        self._do_what_is_due(epoch_ended=True)
                    return
            # Ctrl-C also reaches the worker processes of a DataLoader, whose end is no news then.
            if self._data_error is not None and self._signals.asked is None:
                self._save_before_failing(self._data_error)
                raise self._data_error
            if self._batches.epoch > epoch:
                self._do_what_is_due(epoch_ended=True)

    def _wanted_to_end(self) -> bool:
        return self._stop or self._signals.asked is not None

    def _over(self) -> bool:
        """Whether someone wants the run to end, and every batch that was read has been trained on."""
        return self._wanted_to_end() and self._batches.handed_out == self.step

    def _complete(self) -> bool:
        steps, epochs = self.plan.steps, self.plan.epochs
        return (steps is not None and self.step >= steps) or (epochs is not None and self._batches.epoch >= epochs)

    def _current_epoch(self) -> int:
        """From 1. Batches may have been read to their end while the last ones are in work."""
        current = self._batches.epoch + 1
        return current if self.plan.epochs is None else min(current, self.plan.epochs)

    def _epochs_done(self) -> int:
        """Complete epochs, also when the end of the last one has not been read."""
        per_epoch = self._batches.batches_per_epoch
        return self._batches.epoch if per_epoch is None else max(self._batches.epoch, self.step // per_epoch)

    def _calls(self) -> Iterator[list[Any] | Iterator[Any]]:
        """The rest of one epoch, `steps_per_call` batches at a time: fewer where something falls due or shapes change.

        The first step goes alone, so that it comes soon. A session that works at several batches at once gets a stretch
        of them: an iterator that ends where something falls due.
        """
        batches = self._read()
        if self._session is None:
            for batch in batches:
                yield [batch]
                break
        if self._session is not None and self._session.works_ahead:
            for batch in batches:
                yield stretch(batch, batches, self._stretch_ends)
        else:
            yield from grouped(batches, self.plan.steps_per_call, self._call_ends)

    def _call_ends(self) -> bool:
        """Whether the run is wanted to end, or evaluation or a checkpoint is wanted after the last batch read."""
        intervals = (self.plan.evaluate_every, self.plan.checkpoint_every)
        falls_due = any(every is not None and self._batches.handed_out % every == 0 for every in intervals)
        return falls_due or self._wanted_to_end()

    def _stretch_ends(self) -> bool:
        return self._call_ends() or self._unsaved_for_long() or self._pull_later

    def _read(self) -> Iterator[Any]:
        """The batches of the rest of one epoch. An error waits in `_data_error` until those read were trained on."""
        # An exhausted source is asked for the whole plan: it then says by how much it fell short.
        epochs = self.plan.epochs if self._batches.exhausted else self._batches.epoch + 1
        try:
            yield from self._batches.until(batches=self.plan.steps, epochs=epochs)
        except Exception as error:
            self._data_error = error

    def _take(self, calls: list[Any]) -> None:
        """Run one call's steps."""
        session = self._session or self._begin(calls[0])
        fetches = [TRAIN, *self._fetches]
        if len(calls) == 1:
            values = [v.unsqueeze(0) for v in session.run(fetches, calls[0])[1:]]
        else:
            values = session.run_steps(fetches, calls)[1:]
        if not self._first_step_s:
            self._first_step_s = time.monotonic() - self._started_s
        by_name = dict(zip(self._fetches, values, strict=True))
        for index in range(len(calls)):
            self._after_step({name: value[index] for name, value in by_name.items()}, calls[index])
        last = {name: value[-1] for name, value in by_name.items()}
        examples = sum(examples_in(batch) for batch in calls)
        self._journal.show(self.step, last, examples=examples, epoch=self._current_epoch())

    def _take_stretch(self, batches: Iterator[Any]) -> None:
        """Run a step for every batch, in the order in which they are done."""
        assert self._session is not None
        self._in_stretch = True
        try:
            for found, batch in self._session.stream([TRAIN, *self._fetches], batches):
                values = dict(zip(self._fetches, found[1:], strict=True))
                self._after_step(values, batch)
                self._journal.show(self.step, values, examples=examples_in(batch), epoch=self._current_epoch())
        finally:
            self._in_stretch = False
        if self._pull_later:
            self.pull()

    def _after_step(self, values: Mapping[str, Tensor], batch: Any) -> None:
        self._place = replace(self._place, step=self.step + 1)
        self._check_finite(values["loss"], batch)
        self._journal.step(self.step, values)
        self._callbacks.on_step(self, self.step, values)

    def _check_finite(self, loss: Tensor, batch: Any) -> None:
        # Reading a loss waits for a GPU; there it is looked at when it is logged.
        if loss.device.type != "cpu" and self.step % self.plan.log_every:
            return
        if not bool(torch.isfinite(loss)):
            assert self._session is not None
            self._journal.log(self.step - 1)
            checkpoints = self._saver.checkpoints if self._saver is not None else None
            what = f"the loss became {float(loss)}"
            raise NonFiniteError(explain_nonfinite(self._session, checkpoints, self._batches, self.step, what, batch))

    def _check_parameters(self) -> None:
        """So that no checkpoint, and no finished run, holds a NaN: the loss that shows it may come a step later."""
        if self._session is None or (name := nonfinite_parameter(self._session)) is None:
            return
        checkpoints = self._saver.checkpoints if self._saver is not None else None
        what = f"the parameter {name!r} is no longer finite, though the loss still is,"
        raise NonFiniteError(explain_nonfinite(self._session, checkpoints, self._batches, self.step, what))

    # -- what falls due ------------------------------------------------------------------------------------------

    def _do_what_is_due(self, *, epoch_ended: bool) -> None:
        self._announce_checkpoints()
        if self._batches.handed_out != self.step:
            return  # a batch of another shape was read ahead; nothing falls due before it has been trained on
        if self._session is None:
            self._begin_at_rest()  # it was saved after the last step of an epoch, whose end has only been read now
        if self._is_due(self.plan.evaluate_every, epoch_ended):
            self._evaluate()
        if self._is_due(self.plan.checkpoint_every, epoch_ended) or self._unsaved_for_long():
            self._save()

    def _unsaved_for_long(self) -> bool:
        saver = self._saver
        return self.plan.checkpoint_every is None and saver is not None and saver.age_s > _LONGEST_UNSAVED_S

    def _is_due(self, every: int | None, epoch_ended: bool) -> bool:
        return epoch_ended if every is None else self.step % every == 0

    def _evaluate(self) -> None:
        if self._evaluate_all is None or self._place.evaluated_step == self.step:
            return
        assert self._session is not None
        try:
            with self._journal.paused(), averaged(self._session):
                values = self._evaluate_all()
        except Exception as error:
            self._save_before_failing(error)
            raise
        self._place = replace(self._place, evaluated_step=self.step, evaluation=values)
        self._journal.evaluation(self.step, values)
        if self._saver is not None:
            self._saver.check_monitored(values)
        if self.plan.early_stopping is not None:
            rule = self.plan.early_stopping
            decision = rule.observe(self._place.stopping, rule.value_in(values), self.step)
            self._place = replace(self._place, stopping=decision.state)
            self._stop_if_stopped_early()
        self._callbacks.on_evaluate(self, self.step, values)

    def _stop_if_stopped_early(self) -> None:
        """Also asked when a run goes on: it may have been killed between the decision and its end."""
        rule, state = self.plan.early_stopping, self._place.stopping
        if rule is not None and state.worse_in_a_row >= rule.patience:
            self._journal.say(
                f"stopping early at step {self.step}: {rule.metric} has not improved since step {state.best_step}"
            )
            self._stop = True

    def _save(self) -> None:
        if self._saver is None or self._session is None:
            return
        self._check_parameters()
        position = self._batches.position() if self.step else self._place.position
        self._place = replace(self._place, position=position)
        path = self._saver.save(self._session, self._place)
        if path is not None:
            self._saving.append((self.step, path))

    def _announce_checkpoints(self) -> None:
        """Tell the callbacks of checkpoints that have become whole on the disk since."""
        while self._saving and self._saving[0][1].exists():
            self._callbacks.on_checkpoint(self, *self._saving.pop(0))

    def _save_before_failing(self, error: Exception) -> None:
        """Keep the steps since the last checkpoint when it is the data that fails: the variables are whole."""
        if self._session is None or self._saver is None:
            return
        try:
            if self._batches.handed_out != self.step:  # the batches that do not fit were handed out already
                self._batches.seek(self._place.position)
                for _ in self._batches.until(batches=self.step):
                    pass
            self._save()
            self._saver.wait()
        except Exception as problem:
            error.add_note(f"The steps since the last checkpoint could not be saved: {problem}")
        else:
            error.add_note(f"Step {self.step} was saved in {self.directory}; it can be resumed.")

    # -- beginning and ending ------------------------------------------------------------------------------------

    def _begin(self, batch: Any) -> AnySession:
        graph = self._make_graph(batch)
        self._session = session = self._make_session(graph)
        self._fetches = [name for name in graph.fetches if not name.startswith("gradient/")] + [*session.measures]
        if self._restored is not None:
            self._restore(session, self._restored)
        self._journal.begin(graph, self.step if self._restored is not None else None)
        self._callbacks.on_start(self)
        if self._restored is None:
            self._save()  # a NaN in the first epoch is explained from here
        return session

    def _begin_at_rest(self) -> None:
        """Begin without training on anything: a resumed run that first evaluates, or had reached its end already."""
        self._begin(next(self._batches.one_pass()))

    def _restore(self, session: AnySession, variables: Path) -> None:
        rates = {name: session.read(name) for name in session.variables if name.endswith("/lr")}
        session.restore(variables)
        if isinstance(session, RemoteSession):
            session.taken_before = self.step
        self._journal.say(f"resumed {self.directory} at step {self.step}")
        for name, given in rates.items():
            found = session.read(name)
            if not torch.equal(given, found):
                self._journal.say(f"{name} is {float(found):g} in the checkpoint and stays that, not {float(given):g}")

    def _go_back(self, lost: VariablesLostError) -> None:
        """Begin again from the last checkpoint with new processes. Raises: `lost` where that cannot be."""
        session = self._session
        if self._saver is None or not isinstance(session, RemoteSession):
            lost.add_note("There is no checkpoint to go on from, as there is no run directory (run_dir=False).")
            raise lost
        try:
            self._saver.wait()
            self._announce_checkpoints()
            found = self._saver.newest()
            if found is None:
                raise lost
            place, path = found
            text = self._restarts.note(self.step, place.step, lost)
            self._batches.seek(place.position)
        except MillraceError as problem:
            if problem is not lost:
                lost.add_note(f"The run could not go on from its last checkpoint: {problem}")
            raise lost from None
        self._journal.say(text)
        lost_updates, self._place, self._stop, self._data_error = self.step - place.step, place, False, None
        session.taken_before = self.step
        session.begin_again()
        session.restore(path)
        self._journal.go_back(session.graph, place.step, lost_updates)

    def _finish(self) -> None:
        """Evaluate and save once more, unless that has just been done."""
        if self._session is None and self._signals.asked is None:
            self._begin_at_rest()  # nothing is left to do, but the weights are wanted all the same
        self._journal.log(self.step)
        self._check_parameters()
        self.pull()
        if self._signals.asked is None:
            self._evaluate()
        self._save()
        if self._saver is not None:
            self._saver.wait()
        self._announce_checkpoints()
        if self._session is not None:
            put_averages(self._session)

    def _close(self, outcome: Outcome) -> list[Exception]:
        """Let go of everything, whatever goes wrong with a part of it; returns what did."""
        problems: list[Exception] = []
        closing: list[Callable[[], None]] = [self._batches.close, self._journal.close]
        if self._saver is not None:
            closing.append(self._saver.wait)  # before the directory is free for others
        if (session := self._session) is not None:
            closing += [lambda: self._callbacks.on_end(self, outcome), session.close]
        if (run := self._run) is not None:
            closing.append(lambda: run.close(outcome, self.step))
        for close in closing:
            try:
                close()
            except Exception as error:
                problems.append(error)
        return problems
