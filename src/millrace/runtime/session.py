"""A session holds the variables of a graph and runs the parts of it that are asked for."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.compile.cuda_graph import CapturedSteps
from millrace.compile.layout import Stride, feed_strides, laid_out
from millrace.compile.tiered import Runner, Say
from millrace.errors import FeedError, FetchError, MillraceError, did_you_mean
from millrace.files import make_directory, replacing
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.passes.unroll import unroll
from millrace.graph.signature import Feed, TensorSpec
from millrace.runtime.aliasing import Memory, check_variables
from millrace.runtime.commit import write_failure
from millrace.runtime.feeds import Batch, FeedReader, Key
from millrace.runtime.ranges import Range, check_ranges, feed_ranges
from millrace.runtime.save_nodes import RESTORE, SAVE, SideGraph, restore_graph, save_graph_of
from millrace.runtime.watch import Watch, explained, first_nonfinite, run_watched

log = logging.getLogger(__name__)

MAX_SHAPES = 8  # graphs kept for different batch shapes


@dataclass
class _Program:
    """A part of the graph, for one batch shape, ready to run."""

    graph: Graph
    fetches: tuple[str, ...]
    runner: Runner | CapturedSteps
    strides: list[Stride]  # of one step's feeds
    ranges: tuple[Range, ...]  # of the labels and indices that it looks up


class Session:
    """Holds the variables; runs fetches.

    The variables start as `graph.initial`, which are the traced module's own tensors: the session trains that very
    module, without a copy. `copy=True` gives the session tensors of its own.

    compile: "eager", "inductor" (compile before the first run) or "tiered" (start eager, swap when compiled).
    say: called with one line about compilation; logs it by default.
    max_shapes: how many batch shapes keep their graphs; `warn_new_shape`: whether a new one is worth a warning.
    """

    measures: tuple[str, ...] = ()  # see `RemoteSession`
    works_ahead = False

    def __init__(
        self,
        graph: Graph,
        variables: Mapping[str, Tensor] | None = None,
        *,
        compile: str = "tiered",
        copy: bool = False,
        say: Say = log.info,
        max_shapes: int = MAX_SHAPES,
        warn_new_shape: bool = True,
    ) -> None:
        self.graph = graph
        self.say = say
        self.max_shapes = max_shapes
        self.last_tier = "eager"
        self._warn_new_shape = warn_new_shape
        self._compile = compile
        given = dict(graph.initial) | dict(variables or {})
        missing = [v.name for v in graph.variables if v.name not in given]
        if missing:
            raise FetchError(
                f"no value for {len(missing)} of {len(graph.variables)} variables ({', '.join(missing[:5])}…). "
                "A graph loaded from a file has none: pass `variables`, or restore a checkpoint into the session."
            )
        self._variables = {v.name: given[v.name].detach() for v in graph.variables}
        if copy:
            self._variables = {name: tensor.clone() for name, tensor in self._variables.items()}
        check_variables(graph, self._variables)
        self._reader = FeedReader(graph, Memory(self._variables.values()))
        self._graphs: OrderedDict[Key, Graph] = OrderedDict({_key(f.spec for f in graph.feeds): graph})
        self._programs: dict[tuple[Any, ...], _Program] = {}
        self._watches: list[Watch] = []
        self._side = {SAVE: save_graph_of(graph), RESTORE: restore_graph(graph)}

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need, and nothing else.

        Args:
            fetches: names of the step's results ("loss"), of nodes, of variables, or "train", which applies every
                update. One name gives one value, a sequence a list in its order (None for "train").
            feed: a batch that nests like the traced one; None for fetches that need none.

        Returns: tensors that later steps do not change.

        Raises: FetchError for an unknown name; FeedError for a batch that does not fit.
        """
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        program, feeds = self._program(names, [feed])
        values = self._call(program, feeds)
        results = dict(zip(program.fetches, values, strict=True))
        found = [results.get(name) for name in names]
        return found[0] if isinstance(fetches, str) else found

    def run_steps(self, fetches: Sequence[str], feeds: Sequence[Any]) -> list[Any]:
        """Run one step per batch in a single compiled call. Fetches come back stacked along a new first axis.

        For small models, whose steps cost less than calling them. Raises: FeedError when the batches' shapes differ.
        """
        program, flat = self._program(tuple(fetches), list(feeds))
        values = dict(zip(program.fetches, self._call(program, flat), strict=True))
        return [values.get(name) for name in fetches]

    def stream(self, fetches: Sequence[str], feeds: Iterable[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Run a step for every batch; yields what `run` gives, with the batch.

        Where several processes work at batches of their own, the next batch is taken as soon as one of them is free,
        results come as they are ready, and when the batches are at their end all have been yielded.
        """
        for feed in feeds:
            yield self.run(fetches, feed), feed

    def nodes_for(self, fetches: str | Sequence[str], feed: Any = None) -> list[str]:
        """Names of the nodes that `run(fetches, feed)` executes."""
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        return [node.name for node in self._program(names, [feed])[0].graph.nodes]

    def tier(self, fetches: str | Sequence[str], feed: Any = None, *, wait: bool = False) -> str:
        """Which tier runs these fetches now; `wait` blocks until a background compilation is over."""
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        runner = self._program(names, [feed])[0].runner
        if wait:
            runner.wait()
        return runner.tier

    # -- variables -----------------------------------------------------------------------------------------------

    @property
    def variables(self) -> Mapping[str, Tensor]:
        """The live tensors, by name: training changes them in place. Copy what is to last."""
        return self._variables

    def read(self, name: str) -> Tensor:
        """A copy of a variable's value. Raises FetchError with the nearest names."""
        return self._variable(name).clone()

    def assign(self, name: str, value: Any) -> None:
        """Give a variable a new value of its shape (converted to its dtype and device).

        Raises: FetchError for an unknown name, FeedError for another shape.
        """
        variable = self._variable(name)
        new = torch.as_tensor(value)
        if new.shape != variable.shape:
            raise FeedError(f"variable {name!r} has shape {list(variable.shape)}, got {list(new.shape)}")
        variable.copy_(new)

    def use(self, variables: Mapping[str, Tensor]) -> None:
        """Let other tensors be some of the variables from here on, without a copy.

        Raises: FetchError for an unknown name, FeedError for another shape or dtype.
        """
        for name, tensor in variables.items():
            old = self._variable(name)
            if tensor.shape != old.shape or tensor.dtype != old.dtype or tensor.device != old.device:
                raise FeedError(f"variable {name!r} is {TensorSpec.of(old)}, got {TensorSpec.of(tensor)}")
        self._variables |= {name: tensor.detach() for name, tensor in variables.items()}
        self._reader = FeedReader(self.graph, Memory(self._variables.values()))

    def _variable(self, name: str) -> Tensor:
        if name not in self._variables:
            raise FetchError(f"no variable is called {name!r}. {did_you_mean(name, list(self._variables))}")
        return self._variables[name]

    def pull(self) -> None:
        """Bring the traced module's own tensors up to date. Here they always are; on other devices they may not be."""

    def close(self) -> None:
        """End what compiles in the background. The session can still be used."""
        for program in self._programs.values():
            program.runner.close()

    def side(self, name: str) -> SideGraph:
        """The graph beside the step's: "save" or "restore"."""
        return self._side[name]

    def save(self, path: Path) -> None:
        """Write every variable to one safetensors file, by running the graph's save node.

        The file is there all at once, or the one before it still is. Raises: CheckpointError when it cannot be written.
        """
        path = Path(path)
        try:
            make_directory(path.parent)
            with replacing(path) as temporary:
                self._side[SAVE].run(self._variables, temporary)
        except OSError as error:
            raise write_failure(path, sum(t.nbytes for t in self._variables.values()), error) from error

    def restore(self, path: Path) -> None:
        """Read every variable from a file of `save`, by running the graph's restore node.

        Raises: CheckpointError, with nothing changed, when the file is damaged or of another model.
        """
        self._side[RESTORE].run(self._variables, Path(path))

    # -- looking -------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, pattern: str, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `see(name, tensor)` for every node that runs and whose name, or scope, matches `pattern`.

        Inside the context steps run one operator at a time, eagerly.
        """
        graph = self.graph
        watch = Watch(pattern, see)
        if not any(watch.matches(node) for node in graph.nodes):
            names = [n.name for n in graph.nodes]
            raise FetchError(f"no node or module matches {pattern!r}. {did_you_mean(pattern, names)}")
        self._watches.append(watch)
        try:
            yield
        finally:
            self._watches.remove(watch)

    def first_nonfinite(self, feed: Any) -> str:
        """Which node of the step first makes NaN or infinity from this batch, in words; "" when none does.

        Changes no variable.
        """
        (batch,), graph, _ = self._read((TRAIN,), [feed])
        return first_nonfinite(graph, list(self._variables.values()), laid_out(batch.placed, feed_strides(graph)))

    # -- inside --------------------------------------------------------------------------------------------------

    def _call(self, program: _Program, feeds: list[Tensor]) -> list[Tensor]:
        variables = list(self._variables.values())
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            # The graph says every dtype; outside it, nothing else may change them.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return self._call(program, feeds)
        try:
            if self._watches:
                return run_watched(program.graph, variables, feeds, self._watches)
            return program.runner(variables, feeds)
        except (RuntimeError, IndexError, ValueError) as error:
            found = explained(error, program.graph, variables, feeds)
            if found is None:
                raise
            raise found from error
        finally:
            self.last_tier = program.runner.tier

    def _program(self, names: tuple[str, ...], feeds: Sequence[Any]) -> tuple[_Program, list[Tensor]]:
        """What runs `names` for these batches, one per step, and their tensors: those of the first step first."""
        batches, graph, key = self._read(names, feeds)
        known = self._programs.get((key, names, len(feeds)))
        if known is None:
            train = TRAIN in names
            wanted = tuple(dict.fromkeys(name for name in names if name != TRAIN))
            part = sparse_rows(prune(graph, wanted, graph.updates if train else ()))
            whole = unroll(part, len(feeds)) if len(feeds) > 1 else part
            runner = self._runner(part, whole, len(feeds))
            known = _Program(whole, wanted, runner, feed_strides(part), feed_ranges(part))
            self._programs[(key, names, len(feeds))] = known
        check_ranges(known.ranges, [batch.given for batch in batches])
        return known, [tensor for batch in batches for tensor in laid_out(batch.placed, known.strides)]

    def _runner(self, one: Graph, whole: Graph, steps: int) -> Runner | CapturedSteps:
        """For `steps` of the graph `one`, which are the graph `whole`: a GPU needs only one of them compiled."""
        if steps > 1 and any(v.spec.device.startswith("cuda") for v in one.variables):
            return CapturedSteps(Runner(one, self._compile, self.say), steps, self.say)
        return Runner(whole, self._compile, self.say)

    def _read(self, names: tuple[str, ...], feeds: Sequence[Any]) -> tuple[list[Batch], Graph, Key]:
        if feeds == [None]:
            self._refuse_missing_feed(names)
            return [self._reader.empty()], self.graph, _key(f.spec for f in self.graph.feeds)
        batches = [self._reader.read(feed) for feed in feeds]
        key = batches[0].key
        for batch in batches:
            if batch.key != key:
                changed = _describe_change(self.graph.feeds, batch.key, batches[0].key)
                raise FeedError(f"the batches of one call must be alike: {changed}")
        if key not in self._graphs:
            self._retrace(batches[0], key)
        self._graphs.move_to_end(key)
        return batches, self._graphs[key], key

    def _refuse_missing_feed(self, names: tuple[str, ...]) -> None:
        needed = prune(self.graph, [n for n in names if n != TRAIN], self.graph.updates if TRAIN in names else ())
        inputs = needed.placeholders()
        for feed in self.graph.feeds:
            if inputs[f"feed:{feed.name}"].users:
                raise FeedError(
                    f"{', '.join(names)} needs the feed {feed.name!r} ({feed.spec}), but no batch was given"
                )

    def _retrace(self, batch: Batch, key: Key) -> None:
        changed = _describe_change(self.graph.feeds, key)
        if self.graph.retrace is None:
            raise FeedError(f"{changed}. This graph was loaded from a file and cannot be traced for other shapes.")
        if any(dtype != f.spec.dtype for (_, dtype), f in zip(key, self.graph.feeds, strict=True)):
            raise FeedError(f"{changed}. Convert the batch to the dtype that the step was traced with.")
        try:
            graph = self.graph.retrace(self._reader.nest(batch))
        except (MillraceError, RuntimeError, ValueError, IndexError, TypeError) as error:
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            raise FeedError(f"{changed}, and the step does not run on that: {error}{notes}") from error
        if graph.variables != self.graph.variables:
            raise FeedError(
                f"{changed}, and for this shape the step has other variables: "
                f"{_names(graph.variables)} instead of {_names(self.graph.variables)}. Keep the batch's shape."
            )
        self._make_room(changed)
        # The session has the variables; a second set of optimizer slots would only take memory.
        self._graphs[key] = graph.with_(initial={})

    def _make_room(self, changed: str) -> None:
        """Say that a new shape has come, and drop the least recently used one where there are too many."""
        if len(self._graphs) >= self.max_shapes:
            old, _ = self._graphs.popitem(last=False)
            self._programs = {k: p for k, p in self._programs.items() if k[0] != old}
            warnings.warn(
                f"{changed}: a shape more than the {self.max_shapes} that are kept. The step was traced again and the "
                "least recently used shape dropped. Pad the batches, or drop the last one, to trace less often.",
                stacklevel=6,
            )
        elif self._warn_new_shape:
            warnings.warn(f"{changed}: the step was traced again for the new shape.", stacklevel=6)


def _key(specs: Any) -> Key:
    return tuple((spec.shape, spec.dtype) for spec in specs)


def _names(feeds: Any) -> str:
    return "{" + ", ".join(f if isinstance(f, str) else f.name for f in feeds) + "}"


def _describe_change(feeds: Sequence[Feed], key: Key, expected: Key | None = None) -> str:
    """In which feeds the shapes and dtypes `key` are not those `expected`, which are the traced ones if not given."""
    expected = _key(feed.spec for feed in feeds) if expected is None else expected
    return "; ".join(
        f"feed {feed.name!r} is {dtype} {list(shape)} instead of {old_dtype} {list(old_shape)}"
        for feed, (shape, dtype), (old_shape, old_dtype) in zip(feeds, key, expected, strict=True)
        if (shape, dtype) != (old_shape, old_dtype)
    )
