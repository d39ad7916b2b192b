"""Batches that do not fit: told before anything runs, with what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.small import copied, cross_entropy, differing, labelled, mlp, run_program
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import millrace
from millrace import RunDirectory, Session, fit, training_graph
from millrace.errors import DataError, FeedError, FetchError, MillraceError

QUIET: dict[str, Any] = {"compile": "eager", "progress": False}
GOOD = [labelled(8, seed=n) for n in range(4)]
X, Y = GOOD[0]


def trained(
    directory: Path, data: Any, loss: Any = cross_entropy, model: nn.Module | None = None, **settings: Any
) -> Any:
    model = model or mlp()
    return fit(model, data, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), run_dir=directory,
               **{**QUIET, "epochs": 2, **settings})  # fmt: skip


def last_step(directory: Path) -> int:
    newest = max((directory / "checkpoints").glob("step-????????"))
    return int(newest.name.removeprefix("step-"))


# -- shape and dtype ---------------------------------------------------------------------------------------------------

MISFITS = {
    "another width": (
        (torch.randn(8, 5, dtype=torch.float64), Y),
        r"feed '0' is torch.float64 \[8, 5\] instead of torch.float64 \[8, 4\], and the step does not run on that",
    ),
    "another dtype": (
        (X.float(), Y),
        r"feed '0' is torch.float32 \[8, 4\] instead of torch.float64 \[8, 4\]. Convert the batch to the dtype",
    ),
    "labels of another length": (
        (X, Y[:5]),
        r"feed '1' is torch.int64 \[5\] instead of torch.int64 \[8\], and the ste",
    ),
    "labels as floats": ((X, Y.double()), r"feed '1' is torch.float64 \[8\] instead of torch.int64 \[8\]. Convert"),
    "a part too many": ((X, Y, Y), r"the batch nests as \{0, 1, 2\}, but the graph was traced with \{0, 1\}"),
    "a dict instead": ({"x": X, "y": Y}, r"the batch nests as \{x, y\}, but the graph was traced with \{0, 1\}"),
}


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize(("misfit", "message"), MISFITS.values(), ids=MISFITS)
def test_a_batch_unlike_the_first_is_refused_and_the_steps_before_it_are_kept(
    misfit: Any, message: str, steps_per_call: int, tmp_path: Path
) -> None:
    with pytest.raises(FeedError, match=message) as caught:
        trained(tmp_path / "run", [*GOOD[:3], misfit], steps_per_call=steps_per_call)
    assert "Step 3 was saved in" in "".join(caught.value.__notes__)
    assert last_step(tmp_path / "run") == 3
    # Repaired, it goes on as if it had been right from the start.
    trained(tmp_path / "run", GOOD, resume=True)
    trained(tmp_path / "whole", GOOD)
    found = [load_file(tmp_path / run / "checkpoints/step-00000008/variables.safetensors") for run in ("run", "whole")]
    assert differing(*found) == []


@pytest.mark.parametrize(
    ("batch", "hint"),
    [
        ((X.float(), Y), "dtype"),
        ((torch.randn(8, 5, dtype=torch.float64), Y), r"\[8, 5\]|8x5"),
        ((X, Y[:5]), "batch"),
    ],
    ids=["dtype", "width", "labels"],
)
def test_a_first_batch_that_does_not_fit_the_model_names_the_users_line(batch: Any, hint: str, tmp_path: Path) -> None:
    with pytest.raises((MillraceError, RuntimeError, ValueError), match=hint) as caught:
        trained(tmp_path / "run", [batch])
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "tests/small.py" in told
    assert RunDirectory.open(tmp_path / "run").state.status == "failed"


def test_a_session_refuses_a_batch_that_does_not_fit_and_changes_nothing() -> None:
    model = mlp()
    session = Session(
        training_graph(model, cross_entropy, torch.optim.SGD(model.parameters()), GOOD[0]), compile="eager"
    )
    before = copied(session.variables)
    for misfit, message in MISFITS.values():
        with pytest.raises(FeedError, match=message):
            session.run(["train", "loss"], misfit)
    assert differing(before, session.variables) == []


# -- labels --------------------------------------------------------------------------------------------------------


def with_label(value: int) -> tuple[Tensor, Tensor]:
    labels = Y.clone()
    labels[5] = value
    return X, labels


@pytest.mark.parametrize("value", [3, -1, 10**12])
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_label_out_of_range_is_told_with_the_range(value: int, steps_per_call: int, tmp_path: Path) -> None:
    with pytest.raises(FeedError) as caught:
        trained(tmp_path / "run", [GOOD[0], GOOD[1], with_label(value)], steps_per_call=steps_per_call)
    message = str(caught.value)
    assert (
        f"feed '1' holds {value}, but expected are labels or indices from 0 to 2 (or -100, which it ignores)" in message
    )
    assert "1 of " in message
    assert "node 'nll_loss_forward'" in message
    assert "tests/small.py" in message
    assert "number them from 0" in message
    assert last_step(tmp_path / "run") == (
        2 if steps_per_call == 1 else 1
    )  # the steps of a call stand or fall together


def test_labels_that_are_meant_to_be_ignored_are(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", [with_label(-100)]).outcome == "finished"


def test_a_label_in_the_first_batch_is_found_too(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="feed '1' holds 7"):
        trained(tmp_path / "run", [with_label(7)])


COMPILED = """
import torch, torch.nn.functional as F, millrace
from torch import nn

torch.set_num_threads(2)  # of a compiled step's threads, an exception ends the process
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
x, y = torch.randn(4096, 8), torch.randint(10, (4096,))
bad = y.clone()
bad[3000] = 10
graph = millrace.training_graph(
    model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), torch.optim.SGD(model.parameters(), lr=0.1), (x, y)
)
session = millrace.Session(graph, compile="inductor", say=print)
for _ in range(2):
    session.run(["train", "loss"], (x, y))
print(session.last_tier)
before = {name: tensor.clone() for name, tensor in session.variables.items()}
try:
    session.run(["train", "loss"], (x, bad))
except millrace.errors.FeedError as error:
    print(error)
print("unchanged", all(before[name].equal(tensor) for name, tensor in session.variables.items()))
session.run(["train", "loss"], (x, y))
print("goes on")
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_label_out_of_range_does_not_end_a_process_whose_step_is_compiled(tmp_path: Path) -> None:
    done = run_program(COMPILED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if "staying eager" not in done.stdout:  # a machine without a compiler
        assert "inductor" in done.stdout.splitlines()
    assert "feed '1' holds 10, but expected are labels or indices from 0 to 9" in done.stdout
    assert "unchanged True" in done.stdout
    assert done.stdout.splitlines()[-1] == "goes on"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def next_token(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_tokens_are_looked_at_where_they_are_used(tmp_path: Path) -> None:
    good = torch.arange(12).reshape(3, 4) % 5
    for place, user in (((1, 0), "embedding"), ((1, 3), "nll_loss_forward")):
        bad = good.clone()
        bad[place] = 5
        with pytest.raises(FeedError) as caught:
            trained(tmp_path / user, [good, bad], loss=next_token, model=Tokens())
        assert "feed 'batch' holds 5, but expected are labels or indices from 0 to 4" in str(caught.value)
        assert f"node '{user}'" in str(caught.value)
    unused = torch.cat([good, torch.full((3, 1), 99)], 1)  # a column that the loss cuts off
    result = trained(tmp_path / "cut", [unused], loss=lambda m, b: next_token(m, b[:, :4]), model=Tokens())
    assert result.outcome == "finished"


def test_what_is_not_looked_up_may_have_any_value() -> None:
    model = mlp()
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters()), GOOD[0])
    session = Session(graph, compile="eager")
    logits = next(n.name for n in graph.nodes if n.name.startswith("addmm"))
    assert session.run(logits, with_label(99)).shape == (8, 8)


# -- fetches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["los", "0.wieght", "xyzzy"])
def test_an_unknown_fetch_suggests_the_near_names(name: str) -> None:
    model = mlp()
    session = Session(
        training_graph(model, cross_entropy, torch.optim.SGD(model.parameters()), GOOD[0]), compile="eager"
    )
    before = copied(session.variables)
    with pytest.raises(FetchError) as caught:
        session.run(["train", name], GOOD[0])
    assert repr(name) in str(caught.value)
    assert {"los": "'loss'", "0.wieght": "'0.weight'"}.get(name, "any variable or node name") in str(caught.value)
    assert differing(before, session.variables) == []


# -- empty, and ending early -------------------------------------------------------------------------------------------


def none() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ((X[:0], Y[:0]), None, "the arrays is empty: there must be at least one example"),
        ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, None, "is empty"),
        ([], None, "the list is empty: there must be at least one batch"),
        ([], 4, "the list is empty: there must be at least one example"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), None, "The DataLoader's data set is empty"),
        (DataLoader(TensorDataset(X, Y), batch_size=50, drop_last=True), None, "fewer examples than one batch"),
        ((X, Y), 9, "has 8 examples, fewer than one batch of batch_size=9"),
    ],
    ids=["tensors", "arrays", "batches", "examples", "loader", "dropped", "too few"],
)
def test_an_empty_data_set_is_told_before_a_run_is_begun(
    data: Any, batch_size: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        trained(tmp_path / "run", data, batch_size=batch_size)
    assert not (tmp_path / "run").exists()


def test_a_stream_without_a_batch_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the function none gave no batches: at least one per epoch is needed"):
        trained(tmp_path / "run", none)


def test_data_that_ends_early_leaves_the_steps_that_it_gave(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        trained(tmp_path / "run", iter(GOOD), steps=100, epochs=None)
    message = str(caught.value)
    assert "ended after 4 batches, but 100 batches had been asked for, and it can be read only once" in message
    assert "Give data that can be iterated again" in message
    assert "Step 4 was saved in" in caught.value.__notes__[-1]
    assert last_step(tmp_path / "run") == 4


def test_an_epoch_that_comes_up_empty_is_told(tmp_path: Path) -> None:
    once = iter(GOOD)
    with pytest.raises(DataError, match="gave no batches in epoch 1, after 4 in the epoch before") as caught:
        trained(tmp_path / "run", lambda: once)
    assert "Step 4 was saved in" in caught.value.__notes__[-1]


def test_validation_that_can_be_read_only_once_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validation is .*, which can be read only once, but every evaluation reads"):
        trained(tmp_path / "run", GOOD, validation=iter(GOOD))
    assert not (tmp_path / "run").exists()


def test_validation_that_fails_leaves_the_steps_before_it(tmp_path: Path) -> None:
    calls = iter(range(9))

    def held_out() -> Iterator[Any]:
        if next(calls):
            raise OSError("the disk has gone")
        yield from GOOD

    with pytest.raises(OSError, match="the disk has gone") as caught:
        trained(tmp_path / "run", GOOD, validation=held_out, checkpoint_every=100)
    assert "Step 8 was saved in" in caught.value.__notes__[-1]
    assert last_step(tmp_path / "run") == 8


def test_an_error_while_reading_leaves_the_steps_before_it(tmp_path: Path) -> None:
    def broken() -> Iterator[Any]:
        yield from GOOD[:2]
        raise OSError("a bad sector")

    with pytest.raises(OSError, match="a bad sector") as caught:
        trained(tmp_path / "run", broken)
    assert "Step 2 was saved in" in caught.value.__notes__[-1]
    trained(tmp_path / "run", lambda: iter(GOOD), resume=True)
    assert last_step(tmp_path / "run") == 8


def test_what_the_best_is_chosen_by_must_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(millrace.errors.SettingError, match=r"monitor='accuracy': evaluation gives no such value"):
        trained(tmp_path / "run", GOOD, validation=GOOD, monitor="accuracy")
