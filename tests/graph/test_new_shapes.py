"""A batch of another shape: the step is traced again, with a warning that says which input changed, and a bound."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace import Session
from millrace.errors import FeedError
from millrace.graph import training_graph


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]["x"]), batch["label"])


def batch(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 4, generator=generator)
    return {"inputs": {"x": x.to(dtype)}, "label": torch.arange(size) % 3}


def session_of(net: nn.Module, **options: Any) -> Session:
    graph = training_graph(net, loss, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), batch(8))
    return Session(graph, compile="eager", **options)


def test_a_smaller_last_batch_trains_as_in_eager_and_is_warned_of_once() -> None:
    net, reference = model(), copy.deepcopy(model())
    session = session_of(net)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)

    def epoch() -> None:
        for size in (8, 8, 5):
            _, got = session.run(["train", "loss"], batch(size))
            expected = loss(reference, batch(size))
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-6)

    with pytest.warns(UserWarning, match="traced again") as caught:
        epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch()
        epoch()
    (warning,) = [str(w.message) for w in caught if "traced again" in str(w.message)]
    assert "'inputs.x' is torch.float32 [5, 4] instead of torch.float32 [8, 4]" in warning
    assert "'label' is torch.int64 [5] instead of torch.int64 [8]" in warning
    for got, want in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_only_the_input_that_changed_is_named() -> None:
    def per_row(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
        return (model(given[0]).sum() * given[1].mean()).square()

    net = nn.Linear(4, 3)
    graph = training_graph(net, per_row, torch.optim.SGD(net.parameters(), lr=0.1), (torch.ones(8, 4), torch.ones(2)))
    session = Session(graph, compile="eager")
    with pytest.warns(UserWarning, match=re.escape("feed '1' is torch.float32 [3] instead of torch.float32 [2]")) as w:
        session.run(["train"], (torch.ones(8, 4), torch.ones(3)))
    assert "'0'" not in str(w[0].message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_another_dtype_is_refused_and_changes_nothing(dtype: torch.dtype) -> None:
    net = model()
    session = session_of(net)
    before = copy.deepcopy(net.state_dict())
    message = re.escape(f"'inputs.x' is {dtype} [8, 4] instead of torch.float32 [8, 4]") + ".*Convert the batch"
    with pytest.raises(FeedError, match=message):
        session.run(["train", "loss"], batch(8, dtype))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_shapes_beyond_the_bound_drop_the_least_recently_used() -> None:
    session = session_of(model(), max_shapes=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (8, 5, 8, 6, 8, 5):
            session.run(["train", "loss"], batch(size))
    said = [str(w.message) for w in caught if "traced again" in str(w.message)]
    # 5 is new; 6 is one too many and drops 5; 8 is kept, being used in between; 5 comes again and drops 6.
    assert [re.findall(r"float32 \[(\d), 4\] instead", message)[0] for message in said] == ["5", "6", "5"]
    assert ["dropped" in message for message in said] == [False, True, True]


def test_a_shape_that_the_model_cannot_take_is_refused_with_the_line() -> None:
    session = session_of(model())
    bad = batch(8) | {"inputs": {"x": torch.ones(8, 5)}}
    with pytest.raises(FeedError, match=r"\[8, 5\] instead(.|\n)*test_new_shapes.py:\d+ in loss"):
        session.run(["train", "loss"], bad)
