"""K steps in one call on a GPU: launched once into a CUDA graph, then replayed.

What a small step costs on a GPU is the launching of its kernels from Python. A captured graph launches all of K steps'
kernels at once; it reads and writes fixed memory, which variables have anyway and batches are copied into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.compile.tiered import Runner, Say


class CapturedSteps:
    """Runs `steps` steps per call: one by one while the runner is still eager, replayed once it is compiled.

    Feeds are those of the first step, then those of the second, …; fetches are stacked along a new first axis.
    """

    def __init__(self, runner: Runner, steps: int, say: Say) -> None:
        self._runner = runner
        self._steps = steps
        self._say = say
        self._graph: torch.cuda.CUDAGraph | None = None
        self._feeds: list[Tensor] = []
        self._fetches: list[Tensor] = []
        self._memory: tuple[int, ...] = ()
        self._refused = False

    @property
    def tier(self) -> str:
        return self._runner.tier

    def close(self) -> None:
        """See `Runner.close`."""
        self._runner.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until a compilation that runs in the background is over."""
        self._runner.wait(timeout_s)

    def __call__(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        """Run the steps: `variables` are updated in place, the stacked fetches returned."""
        if self.tier != "inductor" or self._refused:
            return self._one_by_one(variables, feeds)
        memory = tuple(v.data_ptr() for v in variables)
        if self._graph is None or memory != self._memory:
            self._capture(variables, feeds)
            self._memory = memory
        if self._graph is None:
            return self._one_by_one(variables, feeds)
        for fixed, feed in zip(self._feeds, feeds, strict=True):
            fixed.copy_(feed, non_blocking=True)
        self._graph.replay()
        return [fetch.clone() for fetch in self._fetches]

    def _one_by_one(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        each = len(feeds) // self._steps
        results = [self._runner(variables, feeds[each * step : each * (step + 1)]) for step in range(self._steps)]
        return [torch.stack(values) for values in zip(*results, strict=True)]

    def _capture(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> None:
        """Record the launches; nothing runs, so the variables stay as they are."""
        self._feeds = [feed.clone() for feed in feeds]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._fetches = self._one_by_one(variables, self._feeds)
        except RuntimeError as error:  # an operator that waits for the host cannot be captured
            self._refused = True
            self._say(f"steps run one by one: no CUDA graph ({str(error).splitlines()[0]})")
            return
        self._graph = graph
