"""Classified: all examples in their order, whatever the batches, and every mistake counted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from millrace.data.sources import as_batches
from millrace.models.classified import classified


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
def test_every_example_is_there_once_and_in_order(count: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(count, 5, generator=generator), torch.randint(4, (count,), generator=generator)
    model = nn.Linear(5, 4)
    found = classified(model, as_batches((inputs, labels), batch_size=batch_size, shuffle=False, drop_last=False))
    assert found.inputs.equal(inputs)
    assert found.labels.equal(labels)
    assert torch.allclose(found.logits, model(inputs).detach(), atol=1e-6)
    mistakes = found.mistakes()
    assert mistakes.total() == int((found.said != labels).sum())
    for (label, said), times in mistakes.items():
        assert label != said
        assert times == int(((labels == label) & (found.said == said)).sum())
