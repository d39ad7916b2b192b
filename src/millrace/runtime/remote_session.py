"""A session whose variables other processes hold; this process's own are a copy, brought up to date when asked for."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import FeedError, SettingError, WorkerError
from millrace.graph.graph import Graph
from millrace.runtime.save_nodes import SideGraph
from millrace.runtime.session import Session


class RemoteSession(abc.ABC):
    """What `Session` offers, over variables that are elsewhere.

    Close it, or use it as a context, to end the processes. A subclass runs steps and sets `_stale` when they have
    changed the variables.

    measures: names of what it measures of every step by itself, and gives like a fetch.
    works_ahead: whether `stream` works at several batches at once.
    """

    measures: tuple[str, ...] = ()
    works_ahead = False
    taken_before = 0  # steps of the run that are not of this session, which messages count too

    def __init__(self, graph: Graph, variables: Mapping[str, Tensor] | None, say: Say) -> None:
        """variables: name -> value, where they are not `graph.initial`.

        Raises: SettingError for a step on another device than the CPU.
        """
        _refuse_other_devices(graph)
        self.graph = graph
        self._own = Session(graph, variables, compile="eager", say=say)
        self._stale = False  # whether the other processes have newer values than `variables`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """End the processes; what they hold of the variables goes with them."""

    def begin_again(self) -> None:
        """Start anew with other processes, after `VariablesLostError`; the variables are to be restored then.

        Raises: WorkerError of a session whose processes are not replaced.
        """
        raise WorkerError(f"a {type(self).__name__} does not replace lost processes: make another session.")

    @abc.abstractmethod
    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need; see `Session.run`.

        Raises: besides what `Session.run` raises, WorkerError when a process has ended or kept the others waiting.
        """

    def run_steps(self, fetches: Sequence[str], feeds: Sequence[Any]) -> list[Any]:
        """Run one step per batch; fetches come back stacked along a new first axis."""
        found = [self.run(fetches, feed) for feed in feeds]
        return [None if one[0] is None else torch.stack(one) for one in map(list, zip(*found, strict=True))]

    def stream(self, fetches: Sequence[str], feeds: Iterable[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Run a step for every batch; yields what `run` gives, with the batch. See `Session.stream`."""
        for feed in feeds:
            yield self.run(fetches, feed), feed

    @property
    @abc.abstractmethod
    def last_tier(self) -> str:
        """ "inductor" when all that the last step ran was compiled."""

    # -- variables -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def read_all(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Copies of the values of these variables, or of all. Raises FetchError with the nearest names."""

    @abc.abstractmethod
    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Give variables their values, wherever they are."""

    @property
    def variables(self) -> Mapping[str, Tensor]:
        """This process's copy, by name: the traced module's own tensors, brought up to date when asked for."""
        self.pull()
        return self._own.variables

    def pull(self) -> None:
        """Bring the traced module's own tensors up to date."""
        if self._stale:
            for name, value in self.read_all().items():
                self._own.variables[name].copy_(value)
            self._stale = False

    def push(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Give the other processes the values of the traced module's own tensors, or these instead."""
        self._write(self._own.variables if values is None else values)
        self._stale = False

    def read(self, name: str) -> Tensor:
        """A copy of a variable's value. Raises FetchError with the nearest names."""
        return self.read_all([name])[name]

    def assign(self, name: str, value: Any) -> None:
        """Give a variable a new value of its shape; see `Session.assign`."""
        shape = self._own.read(name).shape  # which refuses an unknown name
        new = torch.as_tensor(value)
        if new.shape != shape:
            raise FeedError(f"variable {name!r} has shape {list(shape)}, got {list(new.shape)}")
        self._write({name: new.to(self.graph.variable(name).spec.dtype)})
        self._stale = True

    # -- files and looking ---------------------------------------------------------------------------------------

    def side(self, name: str) -> SideGraph:
        """The graph beside the step's that saves or restores; it runs in this process."""
        return self._own.side(name)

    def save(self, path: Path) -> None:
        """Write every variable to one file; see `Session.save`."""
        self.pull()
        self._own.save(path)

    def restore(self, path: Path) -> None:
        """Read every variable from a file of `save`, and give it to the processes; see `Session.restore`."""
        self._own.restore(path)
        self.push()

    def first_nonfinite(self, feed: Any) -> str:
        """Which node of the step first makes NaN or infinity; see `Session.first_nonfinite`."""
        self.pull()
        return self._own.first_nonfinite(feed)


AnySession = Session | RemoteSession


def _refuse_other_devices(graph: Graph) -> None:
    specs = [*(variable.spec for variable in graph.variables), *(feed.spec for feed in graph.feeds)]
    elsewhere = sorted({spec.device for spec in specs} - {"cpu"})
    if elsewhere:
        raise SettingError(
            "a step that other processes run is traced on the CPU, and this one has tensors on "
            f"{', '.join(elsewhere)}. Leave the model and its batches on the CPU: workers of devices=… put their parts "
            "of the step where they belong, and so do replicas with devices='gpu'."
        )
