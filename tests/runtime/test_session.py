"""A session runs what is asked for and nothing else, and keeps its variables where they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small import copied, cross_entropy, differing, dropout_mlp, labelled, mlp, with_accuracy
from torch import Tensor, nn

from millrace import Graph, Session, training_graph
from millrace.errors import CheckpointError, FeedError, FetchError
from millrace.graph import load_graph, save_graph, trace

Pair = tuple[nn.Module, Session]


def graph_of(model: nn.Module, batch: Any = None, optimizer: Any = torch.optim.SGD, loss: Any = cross_entropy) -> Graph:
    return training_graph(model, loss, optimizer(model.parameters(), lr=0.1), batch or labelled())


@pytest.fixture
def pair() -> Pair:
    model = mlp()
    return model, Session(graph_of(model), compile="eager")


# -- partial execution -----------------------------------------------------------------------------------------------


def test_fetching_the_loss_runs_the_forward_nodes_alone(pair: Pair) -> None:
    _, session = pair
    forward = session.nodes_for("loss", labelled())
    everything = session.nodes_for(["train", "loss"], labelled())
    assert len(forward) < len(everything) / 2
    phases = {session.graph.node(name).meta["millrace"].phase.value for name in forward}
    assert phases == {"forward"}


def test_the_nodes_that_run_are_the_nodes_it_says(pair: Pair) -> None:
    _, session = pair
    for fetches in ("tanh", "loss", ["train"], ["train", "loss"], ["gradient/2.bias"]):
        seen: dict[str, Tensor] = {}
        with session.watching("*", seen.__setitem__):
            session.run(fetches, labelled())
        tensors = [name for name in session.nodes_for(fetches, labelled()) if name in seen]
        assert list(seen) == tensors
        assert seen, fetches


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_node_is_fetched_with_its_ancestors_alone(data: st.DataObject) -> None:
    session = Session(SHARED, compile="eager")
    wanted = data.draw(st.sampled_from([n for n in SHARED.nodes if isinstance(n.meta["val"], Tensor)]))
    ancestors: set[str] = set()
    waiting = [wanted]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node.name not in ancestors:
            ancestors.add(node.name)
            waiting += node.all_input_nodes
    before = copied(session.variables)
    value = session.run(wanted.name, labelled())
    assert set(session.nodes_for(wanted.name, labelled())) == ancestors
    assert list(value.shape) == list(wanted.meta["val"].shape)
    assert differing(before, session.variables) == []


SHARED = graph_of(mlp())


def test_an_intermediate_has_the_value_that_the_module_computes(pair: Pair) -> None:
    model, session = pair
    inputs, labels = labelled()
    assert session.run("tanh", (inputs, labels)).equal(model[:2](inputs))


def test_without_train_nothing_changes_and_with_it_everything_does(pair: Pair) -> None:
    _, session = pair
    before = copied(session.variables)
    session.run(["loss", "gradient/0.weight"], labelled())
    assert differing(before, session.variables) == []
    session.run("train", labelled())
    assert differing(before, session.variables) == ["0.bias", "0.weight", "2.bias", "2.weight", "step"]


def test_one_name_gives_one_value_and_a_list_gives_a_list(pair: Pair) -> None:
    _, session = pair
    loss = session.run("loss", labelled())
    assert isinstance(loss, Tensor)
    listed = session.run(["loss", "train", "loss"], labelled())
    assert listed[0].equal(loss)
    assert listed[1] is None
    assert listed[2].equal(loss)
    assert session.run("train", labelled()) is None


def test_fetches_that_need_no_batch_run_without_one(pair: Pair) -> None:
    model, session = pair
    assert session.run("0.weight").equal(model[0].weight)
    with pytest.raises(FeedError, match=r"loss needs the feed '0' \(f64\[6, 4\]\)"):
        session.run("loss")


# -- results last ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_fetch_is_changed_by_later_steps(optimizer: Any) -> None:
    session = Session(graph_of(mlp(), optimizer=optimizer), compile="eager")
    names = [n.name for n in session.graph.nodes if isinstance(n.meta["val"], Tensor)]
    names += [v.name for v in session.graph.variables]
    for fetches in ([*names], ["train", *names]):
        values = session.run(fetches, labelled())
        kept = [None if v is None else v.clone() for v in values]
        for _ in range(3):
            session.run("train", labelled(seed=7))
        for name, value, was in zip(fetches, values, kept, strict=True):
            assert was is None or value.equal(was), name


def test_a_user_may_change_what_was_fetched(pair: Pair) -> None:
    _, session = pair
    before = copied(session.variables)
    for name in ("0.weight", "t"):  # a variable, and a view of one
        session.run(name, labelled()).zero_()
    assert differing(before, session.variables) == []


# -- variables -----------------------------------------------------------------------------------------------------


def test_the_variables_are_the_modules_own_memory_and_stay_in_place(pair: Pair) -> None:
    model, session = pair
    addresses = {name: tensor.data_ptr() for name, tensor in session.variables.items()}
    for name, parameter in model.named_parameters():
        assert addresses[name] == parameter.data_ptr()
    for _ in range(3):
        session.run(["train", "loss"], labelled())
        session.run_steps(["train", "loss"], [labelled(), labelled(seed=2)])
    assert {name: tensor.data_ptr() for name, tensor in session.variables.items()} == addresses


def test_a_session_with_a_copy_leaves_the_module_alone() -> None:
    model = mlp()
    session = Session(graph_of(model), compile="eager", copy=True)
    before = copied(model.state_dict())
    session.run("train", labelled())
    assert differing(before, model.state_dict()) == []
    assert not session.read("0.weight").equal(model[0].weight)


def test_read_gives_a_copy_and_assign_writes_in_place(pair: Pair) -> None:
    model, session = pair
    read = session.read("2.bias")
    session.assign("2.bias", [1, 2, 3])
    assert model[2].bias.tolist() == [1.0, 2.0, 3.0]
    assert read.tolist() != [1.0, 2.0, 3.0]
    with pytest.raises(FeedError, match=r"'2.bias' has shape \[3\], got \[4\]"):
        session.assign("2.bias", torch.zeros(4))
    assert model[2].bias.tolist() == [1.0, 2.0, 3.0]


def test_training_follows_an_assignment(pair: Pair) -> None:
    _, session = pair
    start = copied(session.variables)
    first = session.run(["train", "loss"], labelled())[1]
    for name, tensor in start.items():
        session.assign(name, tensor)
    assert session.run(["train", "loss"], labelled())[1].equal(first)


def test_unknown_names_suggest_the_near_ones(pair: Pair) -> None:
    _, session = pair
    with pytest.raises(FetchError, match=r"'los'.*'loss'"):
        session.run("los", labelled())
    with pytest.raises(FetchError, match=r"'0.wieght'.*'0.weight'"):
        session.read("0.wieght")
    with pytest.raises(FetchError, match=r"0\.weight"):
        session.assign("0.weights", 0)
    with pytest.raises(FetchError, match="'tanh'"), session.watching("tan", lambda *_: None):
        pass


def test_save_and_restore_are_nodes_that_the_session_runs(pair: Pair, tmp_path: Path) -> None:
    _, session = pair
    session.run("train", labelled())
    saved = copied(session.variables)
    session.save(tmp_path / "state.safetensors")
    session.run("train", labelled())
    addresses = [t.data_ptr() for t in session.variables.values()]
    assert differing(saved, session.variables) != []
    session.restore(tmp_path / "state.safetensors")
    assert differing(saved, session.variables) == []
    assert [t.data_ptr() for t in session.variables.values()] == addresses
    for side in ("save", "restore"):
        targets = [str(node.target) for node in session.side(side).graph.nodes]
        assert f"millrace.{side}_shard.default" in targets


def test_another_models_file_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    _, session = pair
    other = Session(graph_of(nn.Linear(4, 3).double()), compile="eager")
    other.save(tmp_path / "other.safetensors")
    before = copied(session.variables)
    with pytest.raises(CheckpointError, match="another model"):
        session.restore(tmp_path / "other.safetensors")
    assert differing(before, session.variables) == []


def test_a_loaded_graph_needs_values_and_then_trains_the_same(pair: Pair, tmp_path: Path) -> None:
    _, session = pair
    save_graph(session.graph, tmp_path / "step.graph")
    loaded = load_graph(tmp_path / "step.graph")
    with pytest.raises(FetchError, match="pass `variables`"):
        Session(loaded)
    other = Session(loaded, copied(session.variables), compile="eager")
    for _ in range(3):
        assert session.run(["train", "loss"], labelled())[1].equal(other.run(["train", "loss"], labelled())[1])
    assert differing(session.variables, other.variables) == []
    with pytest.raises(FeedError, match="loaded from a file"):
        other.run("loss", labelled(5))


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_a_hook_sees_nodes_by_name_and_by_module(pair: Pair) -> None:
    model, session = pair
    by_name: dict[str, Tensor] = {}
    with session.watching("tanh", by_name.__setitem__):
        session.run("loss", labelled())
    assert by_name["tanh"].equal(model[:2](labelled()[0]))
    by_module: list[str] = []
    with session.watching("2", lambda name, _: by_module.append(name)):
        session.run("loss", labelled())
    assert by_module
    assert all(session.graph.node(name).meta["millrace"].scope == "2" for name in by_module)


def test_a_watched_step_does_what_an_unwatched_one_does() -> None:
    watched, plain = (Session(graph_of(dropout_mlp(), optimizer=torch.optim.AdamW), compile="eager") for _ in range(2))
    for _ in range(3):
        with watched.watching("*", lambda *_: None):
            seen = watched.run(["train", "loss"], labelled())
        assert seen[1].equal(plain.run(["train", "loss"], labelled())[1])
    assert differing(watched.variables, plain.variables) == []


def test_hooks_end_with_their_context_also_when_it_raises(pair: Pair) -> None:
    _, session = pair
    seen: list[str] = []
    with pytest.raises(KeyError), session.watching("tanh", lambda name, _: seen.append(name)):
        raise KeyError
    session.run("loss", labelled())
    assert seen == []


# -- feeds that do not fit -------------------------------------------------------------------------------------------


def test_a_new_shape_is_traced_with_one_warning_that_names_the_input(pair: Pair) -> None:
    model, session = pair
    batch = labelled(5)
    with pytest.warns(UserWarning, match=r"feed '0' is torch.float64 \[5, 4\] instead of") as caught:
        loss = session.run("loss", batch)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert loss.equal(cross_entropy(model, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.run("loss", batch)
        session.run(["train", "loss"], batch)
        session.run("loss", labelled())


def test_shapes_take_turns_without_a_trace_of_it_in_the_result() -> None:
    model, twin = mlp(), mlp()
    session = Session(graph_of(model), compile="eager", warn_new_shape=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for count in (6, 5, 6, 3, 5, 6):
        session.run("train", labelled(count, seed=count))
        optimizer.zero_grad()
        cross_entropy(twin, labelled(count, seed=count)).backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_number_of_shapes_is_bounded() -> None:
    session = Session(graph_of(mlp()), compile="eager", max_shapes=2)
    with pytest.warns(UserWarning, match="traced again"):
        session.run("loss", labelled(5))
    with pytest.warns(UserWarning, match="more than the 2 that are kept"):
        session.run("loss", labelled(4))
    assert len(session._graphs) == 2
    assert {key for key, *_ in session._programs} <= session._graphs.keys()


def test_a_retraced_graph_holds_no_second_set_of_variables() -> None:
    session = Session(graph_of(mlp(), optimizer=torch.optim.AdamW), compile="eager", warn_new_shape=False)
    session.run("train", labelled(5))
    assert all(not graph.initial for graph in session._graphs.values() if graph is not session.graph)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ((labelled()[0].float(), labelled()[1]), r"feed '0' is torch.float32.*Convert"),
        ((labelled()[0], labelled()[1].double()), r"feed '1' is torch.float64"),
        (labelled()[0], r"nests as \{batch\}.*traced with \{0, 1\}"),
        ({"x": labelled()[0], "y": labelled()[1]}, r"nests as \{x, y\}"),
        ((labelled()[0], labelled()[1], labelled()[1]), r"nests as \{0, 1, 2\}"),
        ((labelled()[0].numpy(), labelled()[1]), "expected a tensor, got ndarray"),
        ((labelled()[0][:, :3], labelled()[1]), r"feed '0' is torch.float64 \[6, 3\].*does not run on that"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(pair: Pair, feed: Any, message: str) -> None:
    _, session = pair
    before = copied(session.variables)
    with pytest.raises(FeedError, match=message):
        session.run("train", feed)
    assert differing(before, session.variables) == []
    session.run("train", labelled())


def test_a_step_that_differs_by_shape_in_its_variables_is_refused() -> None:
    def step(v: dict[str, Any], batch: Tensor) -> Tensor:
        v["w"] = v["w"] + (torch.rand(3, dtype=torch.float64) if len(batch) > 2 else 1)
        return v["w"].sum()

    session = Session(trace(step, {"w": torch.zeros(3, dtype=torch.float64)}, torch.zeros(2)), compile="eager")
    with pytest.raises(FeedError, match="other variables"):
        session.run("result", torch.zeros(3))


# -- several steps in one call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_several_steps_in_one_call_are_several_runs(optimizer: Any) -> None:
    together, apart = (
        Session(graph_of(dropout_mlp(), optimizer=optimizer, loss=with_accuracy), compile="eager") for _ in range(2)
    )
    batches = [labelled(seed=n) for n in range(4)]
    stacked = together.run_steps(["train", "loss", "accuracy"], batches)
    single = [apart.run(["train", "loss", "accuracy"], batch) for batch in batches]
    assert stacked[0] is None
    assert stacked[1].tolist() == [float(values[1]) for values in single]
    assert stacked[2].tolist() == [float(values[2]) for values in single]
    assert differing(together.variables, apart.variables) == []


def test_batches_of_one_call_must_be_alike(pair: Pair) -> None:
    _, session = pair
    with pytest.raises(FeedError, match="must be alike"):
        session.run_steps(["train", "loss"], [labelled(6), labelled(5)])


def test_several_steps_of_another_shape_are_traced_once(pair: Pair) -> None:
    _, session = pair
    with pytest.warns(UserWarning, match=r"\[5, 4\]") as caught:
        session.run_steps(["train", "loss"], [labelled(5), labelled(5)])
    assert len(caught) == 1
