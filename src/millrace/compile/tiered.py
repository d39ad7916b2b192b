"""The tiers: start eager at once, go on compiled when the compiled callable is ready and has proved right."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from millrace.compile.background import BackgroundCompilation
from millrace.compile.compare import counted_fetches, difference, movements, tolerance
from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.heap import give_back_freed_memory, keep_freed_memory
from millrace.compile.inductor import compile_inductor, one_line
from millrace.compile.threads import at_most, free_threads, is_small
from millrace.errors import CompileError, SettingError
from millrace.graph.graph import Graph

TIERS = ("eager", "inductor", "tiered")
Say = Callable[[str], None]


class Runner:
    """Runs one graph under one of the tiers. `tier` tells which callable the last call used.

    Args: writable: feeds whose memory an eager call may use for its results.
    """

    def __init__(self, graph: Graph, compile: str, say: Say, writable: Collection[str] = ()) -> None:
        if compile not in TIERS:
            raise SettingError(f"compile={compile!r}: expected one of {', '.join(TIERS)}")
        keep_freed_memory()
        self.tier = "eager"
        self._graph = graph
        self._say = say
        self._run = compile_eager(graph, writable)
        self._small = is_small(graph)
        self._calls = 0
        self._wanted = compile if graph.nodes else "settled"  # nothing to compile
        self._background: BackgroundCompilation | None = None
        self._unproved: tuple[Compiled, float] | None = None
        self._proofs_left = 3
        if self._wanted == "inductor":
            try:
                self._unproved = (compile_inductor(graph), 0.0)
            except CompileError as error:
                self._stay_eager(str(error))

    def __call__(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        """Run the step: `variables` are updated in place, the fetches returned."""
        self._calls += 1
        if self._wanted == "tiered":
            self._watch_background()
        run = self._run if self._unproved is None else self._prove
        with at_most(1 if self._small else free_threads()):
            return run(variables, feeds)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until a compilation that runs in the background is over; the next call then uses it."""
        if self._wanted == "tiered" and self._background is None:
            self._begin()
        if self._background is not None:
            self._background.wait(timeout_s)

    def close(self) -> None:
        """End a compilation that runs in the background; calls go on as they are."""
        if self._background is not None:
            self._background.cancel()
            self._background, self._wanted = None, "settled"

    def _begin(self) -> None:
        self._background = BackgroundCompilation(self._graph)
        # Nobody will call what is compiled for a runner that is gone.
        weakref.finalize(self, self._background.cancel)

    def _watch_background(self) -> None:
        if self._background is None:
            if self._calls == 2:  # a graph that is run once (a last, smaller batch) is not worth compiling
                self._begin()
            return
        result = self._background.result
        if result is None:
            return
        self._wanted = "settled"
        if isinstance(result, CompileError):
            self._stay_eager(str(result))
        else:
            self._unproved = (result, self._background.seconds)
        self._background = None

    def _prove(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        """Take this step compiled on copies, take it again eagerly, and swap if both agree.

        Compilers have been silently wrong on steps with assignments; one step is a small price.
        """
        assert self._unproved is not None
        compiled, seconds = self._unproved
        updated = [position for position, v in enumerate(self._graph.variables) if v.name in self._graph.updates]
        try:
            copies = list(variables)
            for position in updated:
                copies[position] = variables[position].clone()
            fetched = compiled(copies, feeds)
            moved = movements([variables[i] for i in updated], [copies[i] for i in updated])
            failure = ""
        except Exception as error:  # the compiled code is foreign; whatever it raises, the run goes on
            failure = f"the compiled step raised {one_line(error)}"
        expected = self._run(variables, feeds)  # when this raises too, the batch is at fault and the proof waits
        if not failure:
            failure = difference(
                moved,
                [copies[i] for i in updated],
                [variables[i] for i in updated],
                fetched,
                expected,
                tolerance(self._graph),
                counted_fetches(self._graph),
            )
            new_values = [*expected, *(variables[i] for i in updated)]
            if failure and self._proofs_left > 1 and not all(map(_is_finite, new_values)):
                self._proofs_left -= 1  # NaN proves nothing
                return expected
            failure = failure and f"the compiled step differs from the eager one: {failure}"
        self._unproved = None
        if failure:
            self._stay_eager(failure)
        else:
            self._swap_in(compiled, seconds)
        return expected

    def _swap_in(self, compiled: Compiled, seconds: float) -> None:
        self._run = compiled
        self.tier = "inductor"
        give_back_freed_memory()
        took = f" in {seconds:.1f} s" if seconds else ""
        self._say(f"compiled {len(self._graph.nodes)} nodes{took}; swapped in at call {self._calls}")

    def _stay_eager(self, why: str) -> None:
        self._say(f"staying eager: {why.splitlines()[0]}")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
