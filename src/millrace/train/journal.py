"""Where a run's figures go: metrics.jsonl, TensorBoard's events and the progress display."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from millrace.graph.graph import Graph
from millrace.graph.places import Places
from millrace.train.events import EventWriter
from millrace.train.graph_views import node_views
from millrace.train.metrics import RunningMeans
from millrace.train.progress import Progress
from millrace.train.run_directory import RunDirectory


class Journal:
    """Notes what a run measures. Without a run directory it only shows progress.

    places: tells of a graph which device runs what, where there are several.
    means: of the training loss and metrics when they were last logged. say: shows a line, and keeps it in log.txt.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        progress: Progress,
        *,
        log_every: int,
        places: Callable[[Graph], Places] | None = None,
    ) -> None:
        self.means: dict[str, float] = {}
        self.say = sayer(run, progress)
        self._run = run
        self._progress = progress
        self._log_every = log_every
        self._places = places
        self._running = RunningMeans()
        self._unlogged = 0
        self._events: EventWriter | None = None

    def begin(self, graph: Graph, resumed_step: int | None) -> None:
        """Open the events: the graph goes in at the start of a run, not again when it is resumed."""
        if self._run is None:
            return
        # 0 also when nothing is resumed: a run killed before its first checkpoint has left events of its first steps.
        self._events = EventWriter(self._run.events, resume_step=resumed_step or 0)
        if resumed_step is None:
            self._events.graph(node_views(graph, self._places(graph) if self._places else None))

    def step(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in one step's loss and metrics; every `log_every` steps their means are logged."""
        self._running.update(values)
        self._unlogged += 1
        if step % self._log_every == 0:
            self.log(step)

    def log(self, step: int) -> None:
        """Log the means of the steps since the last time, if there were any."""
        if not self._unlogged:
            return
        self.means = self._running.read()
        self._running.reset()
        self._unlogged = 0
        self._write(step, self.means, {f"train/{name}": value for name, value in self.means.items()})
        if self._run is not None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self.means.items())
            self._run.note(f"step {step}: {shown}")

    def go_back(self, graph: Graph, step: int, lost: int) -> None:
        """Forget what came after a step that the run goes on from, and log how many updates were lost."""
        self._running.reset()
        self._unlogged = 0
        self.close()
        self.begin(graph, step)
        self._progress.go_back(step)
        values = {"recovery/lost_updates": float(lost)}
        self._write(step, values, values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Log and show what an evaluation found."""
        named = {f"validation/{name}": value for name, value in values.items()}
        self._write(step, named, named)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}: validation {shown}")

    def show(self, step: int, values: Mapping[str, Tensor], *, examples: int, epoch: int) -> None:
        """Move the progress display on."""
        self._progress.update(step, values, examples=examples, epoch=epoch)

    def paused(self) -> AbstractContextManager[None]:
        """Time that does not count in the rate."""
        return self._progress.paused()

    def close(self) -> None:
        """Close the events."""
        if self._events is not None:
            self._events.close()

    def _write(self, step: int, values: Mapping[str, float], scalars: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log(step, values)
        if self._events is not None:
            self._events.scalars(step, scalars)


def sayer(run: RunDirectory | None, progress: Progress) -> Callable[[str], None]:
    """What shows a line, and keeps it in the run's log. Any thread may call it."""

    def say(text: str) -> None:
        progress.message(text)
        if run is not None:
            run.note(text)

    return say
