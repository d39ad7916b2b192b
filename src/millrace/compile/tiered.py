"""The tiers: start eager at once, go on compiled when the compiled callable is ready and has proved right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from millrace.compile.background import BackgroundCompilation
from millrace.compile.compare import difference, tolerance
from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.inductor import compile_inductor
from millrace.errors import CompileError, SettingError
from millrace.graph.graph import Graph

TIERS = ("eager", "inductor", "tiered")
Say = Callable[[str], None]


class Runner:
    """Runs one graph under one of the tiers. `tier` tells which callable the last call used."""

    def __init__(self, graph: Graph, compile: str, say: Say) -> None:
        if compile not in TIERS:
            raise SettingError(f"compile={compile!r}: expected one of {', '.join(TIERS)}")
        self.tier = "eager"
        self._graph = graph
        self._say = say
        self._eager = compile_eager(graph)
        self._run = self._eager
        self._calls = 0
        self._wanted = compile
        self._background: BackgroundCompilation | None = None
        self._unproved: tuple[Compiled, float] | None = None
        if compile == "inductor":
            try:
                self._unproved = (compile_inductor(graph), 0.0)
            except CompileError as error:
                self._stay_eager(str(error))

    def __call__(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        """Run the step: `variables` are updated in place, the fetches returned."""
        self._calls += 1
        if self._wanted == "tiered":
            self._watch_background()
        if self._unproved is not None:
            return self._prove(variables, feeds)
        return self._run(variables, feeds)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until a compilation that runs in the background is over; the next call then uses it."""
        if self._wanted == "tiered" and self._background is None:
            self._background = BackgroundCompilation(self._graph)
        if self._background is not None:
            self._background.wait(timeout_s)

    def _watch_background(self) -> None:
        if self._background is None:
            if self._calls == 2:  # a graph that is run once (a last, smaller batch) is not worth compiling
                self._background = BackgroundCompilation(self._graph)
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
        """Take this step eagerly, take it again compiled on copies, and swap if both agree.

        Compilers have been silently wrong on steps with assignments; one step is a small price.
        """
        assert self._unproved is not None
        compiled, seconds = self._unproved
        before = [v.clone() for v in variables]
        after = [v.clone() for v in before]
        failure = None
        try:
            fetched = compiled(after, feeds)
        except Exception as error:  # the compiled code is foreign; whatever it raises, the run goes on
            failure = f"the compiled step raised {type(error).__name__}: {error}"
        expected = self._run(variables, feeds)  # when this raises too, the batch is at fault and the proof waits
        self._unproved = None
        if failure is not None:
            self._stay_eager(failure)
            return expected
        wrong = difference(before, variables, after, expected, fetched, tolerance(self._graph))
        if wrong:
            self._stay_eager(f"the compiled step differs from the eager one: {wrong}")
        else:
            self._run = compiled
            self.tier = "inductor"
            took = f" in {seconds:.1f} s" if seconds else ""
            self._say(f"compiled {len(self._graph.nodes)} nodes{took}; swapped in at call {self._calls}")
        return expected

    def _stay_eager(self, why: str) -> None:
        self._say(f"staying eager: {why}")
