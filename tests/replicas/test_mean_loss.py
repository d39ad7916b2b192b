"""Losses that replicas cannot divide: sums over the examples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.graph.step_models import MODELS, batch_of
from tests.replicas.real_session import session_over
from torch import Tensor, nn

import millrace
from millrace.errors import SettingError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.replicas.mean_loss import check_mean
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync, Update

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def mean(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def weighted(net: nn.Module, batch: Batch) -> Tensor:
    weights = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    return F.cross_entropy(net(batch[0]), batch[1], weight=weights) + 0.1 * sum(
        p.square().sum() for p in net.parameters()
    )


def contrasted(net: nn.Module, batch: Batch) -> Tensor:
    """With the other examples of the batch; no sum, although it grows."""
    found = net(batch[0])
    return F.cross_entropy(found @ found.T, torch.arange(len(found)))


def log_sum(net: nn.Module, batch: Batch) -> Tensor:
    return torch.logsumexp(mean_of_each(net, batch), 0)


def mean_of_each(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def summed(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="sum")


def over_a_constant(net: nn.Module, batch: Batch) -> Tensor:
    return mean_of_each(net, batch).sum() / 128


def ignoring_all(net: nn.Module, batch: Batch) -> Tensor:
    return mean_of_each(net, batch).sum() * 0.0


def not_of_one_example(net: nn.Module, batch: Batch) -> Tensor:
    found = net(batch[0])
    return mean(net, batch) + torch.linalg.inv(torch.diag(found[0] - found[-1])).sum()


def normalized() -> nn.Module:
    """Of examples that are all alike it makes nothing."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def made(model: str) -> tuple[Callable[[], nn.Module], str]:
    return (normalized, "numbers") if model == "normalized" else MODELS[model]


def graph_of(model: str, loss: Loss, size: int) -> Graph:
    make, kind = made(model)
    torch.manual_seed(0)
    return training_graph(make().double(), loss, millrace.optim.sgd(0.1), batch_of(kind, size), seed=0)


def checked(model: str, loss: Loss, sizes: tuple[int, int]) -> bool:
    whole, part = (graph_of(model, loss, size) for size in sizes)
    feeds = batch_of(made(model)[1], 9)
    before = {name: value.clone() for name, value in whole.initial.items()}
    seen = check_mean(whole, part, whole.initial, feeds)
    assert all(torch.equal(value, before[name]) for name, value in whole.initial.items())
    return seen


@pytest.mark.parametrize("sizes", [(8, 4), (7, 4), (2, 3)])
@pytest.mark.parametrize("model", ["mlp", "normalized", pytest.param("lstm", marks=pytest.mark.long)])
def test_a_sum_is_refused_and_a_mean_is_not(model: str, sizes: tuple[int, int]) -> None:
    for loss in (mean, weighted, contrasted, log_sum):
        assert checked(model, loss, sizes)
    for loss in (summed, over_a_constant):
        with pytest.raises(SettingError, match=f"over {sizes[0]} copies of an example"):
            checked(model, loss, sizes)


def test_what_says_nothing_is_let_pass() -> None:
    assert not checked("mlp", ignoring_all, (8, 4))
    assert not checked("mlp", not_of_one_example, (8, 4))
    assert not checked("mlp", summed, (21, 20))  # too much alike
    assert not checked("dropout", summed, (8, 4))  # each copy would have other numbers


@pytest.mark.parametrize(
    "update", [Sync(), LocalSteps(), Sync(parameter_servers=1, copies=False), Hybrid(copies=False)]
)
def test_replicas_that_divide_batches_refuse_a_sum_in_the_first_step(update: Update) -> None:
    refused = pytest.raises(SettingError, match="the loss is a sum over the examples")
    with session_over(graph_of("mlp", summed, 8), update, 2) as session, refused:
        session.run([TRAIN, "loss"], batch_of("numbers", 8))


def test_asynchronous_replicas_take_sums() -> None:
    with session_over(graph_of("mlp", summed, 8), Async(copies=False), 1) as session:
        assert session.run([TRAIN, "loss"], batch_of("numbers", 8))[1] > 0
        assert session.run([TRAIN, "loss"], batch_of("numbers", 4, 1))[1] > 0
