"""K steps as one graph are K steps, one after the other."""

from __future__ import annotations

import torch

from millrace.compile.eager import compile_eager
from millrace.graph.check import check
from millrace.graph.passes.prune import prune
from millrace.graph.passes.unroll import unroll

from .programs import deep_graph


def test_unrolled_steps_equal_single_ones() -> None:
    whole = deep_graph()
    one = prune(whole, ["loss"], whole.updates)
    three = check(unroll(one, 3))
    batches = [(torch.randn(6, 8), torch.randint(0, 5, (6,))) for _ in range(3)]
    apart = [t.detach().clone() for t in one.initial.values()]
    together = [t.clone() for t in apart]
    run = compile_eager(one)
    losses = torch.stack([run(apart, list(batch))[0] for batch in batches])
    (stacked,) = compile_eager(three)(together, [feed for batch in batches for feed in batch])
    assert torch.equal(stacked, losses)
    assert losses.unique().numel() == 3  # dropout and the updates went on between the steps
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_every_step_has_feeds_of_its_own_and_fetches_are_stacked() -> None:
    whole = deep_graph()
    one = prune(whole, ["loss"], ())
    four = check(unroll(one, 4))
    assert [(f.name, f.spec.shape) for f in four.feeds[:3]] == [("0.0", (6, 8)), ("0.1", (6,)), ("1.0", (6, 8))]
    assert four.node(four.fetches["loss"]).meta["val"].shape == (4,)
    assert len(four.nodes) > 3 * len(one.nodes)
    assert not four.updates
