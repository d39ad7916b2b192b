"""What a worker does with the variables that it is sent when a group is formed again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.replicas import worker
from millrace.replicas.protocol import Adopt, Broadcast


class SentTwos:
    """A group in which everybody but rank 0 receives twos."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.parts: list[int] = []

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        self.parts.append(len(tensors))
        for tensor in tensors:
            if self.rank != source:
                tensor.fill_(2.0)


@pytest.mark.parametrize(("rank", "after"), [(0, 1.0), (1, 1.0), (2, 2.0)], ids=["source", "not behind", "behind"])
def test_only_who_is_behind_takes_what_it_is_sent(rank: int, after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PART_BYTES", 30)
    own = {name: torch.ones(4) for name in "abcde"}
    group: Any = SentTwos(rank)
    one: Any = object.__new__(worker._Worker)
    one._replica = SimpleNamespace(variables=own)
    one._group, one._staged = group, {}
    one._line = SimpleNamespace(progress=lambda *said, **more: None)
    one._do(Broadcast(1, 0, (2,), 5))
    assert group.parts == [2, 2, 1]
    assert all(torch.equal(value, torch.ones(4)) for value in own.values())  # until all of it is there
    if rank == 2:
        one._do(Adopt(1, 5))
    assert all(torch.equal(value, torch.full((4,), after)) for value in own.values())
