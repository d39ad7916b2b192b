"""The all-reduce of a step, in stages: a thread adds up the first gradients while the others are computed.

The bits do not depend on when a stage begins: which tensors are in it, and the order of the stages, are the same on all
ranks and in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from millrace.replicas.buckets import divide
from millrace.replicas.collective import Group, Handle


def reducing_thread() -> ThreadPoolExecutor:
    """The thread of a worker's reductions, one after the other; it is kept from step to step."""
    return ThreadPoolExecutor(1, thread_name_prefix="millrace-reduction")


class Reduction:
    """One step's. From the first stage on, the group is used by the thread alone until `finish` has returned or raised.

    Every wait of the thread's is one of the group's, which ends when the group is abandoned.
    """

    def __init__(self, group: Group, thread: ThreadPoolExecutor) -> None:
        self._group, self._thread = group, thread
        self._begun: list[Future[None]] = []
        self._handles: list[Handle] = []
        self._buckets = 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Begin to add up a stage, in place: leave its tensors alone until `finish`. All ranks add the same stages."""
        self._begun.append(self._thread.submit(self._begin, tuple(tensors)))

    def finish(self) -> None:
        """Return when all stages are added up.

        Raises: what `Group.all_reduce` raises, the first of it.
        """
        last = self._thread.submit(self._wait)
        for stage in self._begun:
            stage.result()
        last.result()

    def _begin(self, tensors: Sequence[Tensor]) -> None:
        for places in divide([t.nbytes for t in tensors], [t.dtype for t in tensors]):
            bucket = [tensors[place] for place in places]
            self._handles.append(self._group.all_reduce_begin(self._buckets, bucket, 1.0))
            self._buckets += 1
        if self._group.works_in_wait:
            self._wait()

    def _wait(self) -> None:
        handles, self._handles = self._handles, []
        self._group.wait(handles)
