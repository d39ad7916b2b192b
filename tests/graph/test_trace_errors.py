"""What cannot be traced is refused: with the user's own line, the reason, and a way out.

Errors of the user's own making keep their type and get a note.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from millrace.errors import TraceError
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.graph.training import training_graph

HERE = Path(__file__).name
Body = Callable[[dict[str, Any], Tensor], Any]


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def traced(body: Body, **variables: Any) -> Graph:
    return trace(body, {"": linear(), **variables}, torch.randn(3, 4))


def refused(function: Callable[[], Any], message: str) -> None:
    """`function` raises a TraceError that begins with a line of this file and says `message` and a way out."""
    with pytest.raises(TraceError) as caught:
        function()
    text = str(caught.value)
    assert re.match(rf"[^ ]*{HERE}:\d+ in [^:]+: ", text), f"no line of the user's: {text}"
    line = int(text.partition(f"{HERE}:")[2].partition(" ")[0])
    assert line > Path(__file__).read_text().splitlines().index("# The steps.") + 1, "the line is not in the step"
    assert re.search(message, text), text


# The steps.

OUTSIDE = nn.Parameter(torch.ones(4))
SEEN = torch.zeros(3, 4)
GENERATOR = torch.Generator()


def branch(v: dict[str, Any], x: Tensor) -> Any:
    if x.sum() > 0:
        return x.sum()
    return x.mean()


def unbounded(v: dict[str, Any], x: Tensor) -> Any:
    while x.abs().sum() < 10:
        x = x * 2
    return x.sum()


def counted(v: dict[str, Any], x: Tensor) -> Any:
    for _ in range(x.argmax()):  # type: ignore[call-overload]
        x = x + 1
    return x


def asserted(v: dict[str, Any], x: Tensor) -> Any:
    assert not torch.isnan(x).any()
    return x.sum()


def looked_at(v: dict[str, Any], x: Tensor) -> Any:
    print(x)
    return x.sum()


def written(v: dict[str, Any], x: Tensor) -> Any:
    SEEN.add_(x)
    return x.sum()


def seeded(v: dict[str, Any], x: Tensor) -> Any:
    torch.manual_seed(0)
    return torch.rand(3).sum()


def packed(v: dict[str, Any], x: Tensor) -> Any:
    lengths = torch.tensor([3, 2, 1])
    return nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True).data.sum()


def in_another_thread(v: dict[str, Any], x: Tensor) -> Any:
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(x.sum()))
    worker.start()
    worker.join()
    return found[0] * 2


VALUE = r"reads a tensor's value into Python(.|\n)*torch\.where(.|\n)*torch\.cond(.|\n)*scan"
SIZE = r"size depends on values(.|\n)*use a mask"
TEXT = r"formats a tensor's value(.|\n)*Session\.watching"

STEPS: dict[str, tuple[Body, str]] = {
    "if": (branch, VALUE),
    "while": (unbounded, VALUE),
    "for": (counted, VALUE),
    "assert": (asserted, VALUE),
    "item": (lambda v, x: x.sum() * x.sum().item(), VALUE),
    "float": (lambda v, x: x.sum() * float(x.sum()), VALUE),
    "int as index": (lambda v, x: x[int(x.argmax())], VALUE),
    "tolist": (lambda v, x: x.sum() * x[0].tolist()[0], VALUE),
    "slice": (lambda v, x: x[: x.argmax()].sum(), VALUE),
    "allclose": (lambda v, x: x.sum() * torch.allclose(x, x), r"aten\.allclose\.default` depends on values"),
    "mask": (lambda v, x: x[x > 0].sum(), SIZE),
    "nonzero": (lambda v, x: x.nonzero().sum(), SIZE),
    "where": (lambda v, x: torch.where(x > 0)[0].sum(), SIZE),
    "masked_select": (lambda v, x: x.masked_select(x > 0).sum(), SIZE),
    "unique": (lambda v, x: x.unique().sum(), SIZE),
    "bincount": (lambda v, x: x.long().abs().flatten().bincount().sum(), SIZE),
    "one_hot": (lambda v, x: F.one_hot(x.long().abs()[:, 0]).sum(), VALUE),
    "adaptive softmax": (
        lambda v, x: nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3])(x, torch.tensor([0, 4, 9])).loss,
        SIZE,
    ),
    "numpy": (lambda v, x: x.detach().numpy().sum(), TEXT),
    "asarray": (lambda v, x: np.asarray(x).sum(), TEXT),
    "print": (looked_at, TEXT),
    "str": (lambda v, x: x.sum() * len(str(x)), TEXT),
    "format": (lambda v, x: x.sum() * len(f"{x.sum():.3f}"), TEXT),
    "manual_seed": (seeded, r"Leave it out(.|\n)*`seed`"),
    "generator": (lambda v, x: torch.rand(3, generator=GENERATOR).sum(), "Leave the `generator` argument out"),
    "in-place generator": (lambda v, x: x.clone().normal_(generator=GENERATOR), "Leave the `generator` argument out"),
    "parameter outside": (lambda v, x: (x * OUTSIDE).sum(), r"\[4\] that requires a gradient and is not among"),
    "written outside": (written, r"changes a tensor of shape \[3, 4\] that is not among the variables"),
    "packed sequence": (packed, "leave the batch padded"),
    "thread": (in_another_thread, "in the step's own thread"),
    "memory": (lambda v, x: x.data_ptr() * x.sum(), r"reaches for a tensor's memory(.|\n)*custom-ops"),
    "text returned": (lambda v, x: {"loss": "low"}, r"returns str under 'loss'"),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str) -> None:
    body, message = STEPS[name]
    refused(lambda: traced(body), message)


# Variables.


def bound(name: str, value: Callable[[Tensor], Any]) -> Body:
    def step(v: dict[str, Any], x: Tensor) -> Any:
        v[name] = value(x)
        return x.sum()

    return step


def removed(v: dict[str, Any], x: Tensor) -> Any:
    del v["w"]
    return x.sum()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bound("w", lambda x: torch.cat([x, x])), r"'w' is f32\[3, 4\], but the step gives it f32\[6, 4\]"),
        (bound("w", lambda x: x.double()), r"'w' is f32\[3, 4\], but the step gives it f64\[3, 4\]"),
        (bound("w", lambda x: 3.0), r"but the step gives it float"),
        (bound("ww", lambda x: x), r"'ww', which is not among the variables(.|\n)*Did you mean 'w'"),
        (bound("", lambda x: nn.Linear(4, 4)), "puts another module in the place"),
        (removed, "removes the variable 'w'"),
        (lambda v, x: setattr(v["w"], "data", x[:2]), r"`.data` is f32\[3, 4\] and is given f32\[2, 4\]"),
    ],
    ids=["shape", "dtype", "number", "unknown", "module", "removed", "data"],
)
def test_a_variable_keeps_its_name_shape_and_dtype(body: Body, message: str) -> None:
    refused(lambda: traced(body, w=torch.zeros(3, 4)), message)


def test_a_buffer_that_grows_is_refused_at_the_models_line() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x])
            return x

    refused(lambda: traced(lambda v, x: v["m"](x), m=Growing()), r"in forward: variable 'm.seen' is f32\[1, 4\]")


def test_the_callers_own_tensor_is_not_the_variable() -> None:
    w = torch.zeros(3, 4)
    refused(lambda: traced(lambda v, x: (w * x).sum(), w=w), r"v\['w'\]")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"w": 3.0}, r"got float. Wrap numbers as torch.tensor"),
        ({"a": linear(), "a.weight": torch.zeros(3)}, "two variables are called 'a.weight'"),
        ({"m": torch.jit.script(linear())}, r"module 'm' is a TorchScript module(.|\n)*it was made from"),
        ({"m": nn.Sequential(nn.DataParallel(linear()))}, r"module 'm.0' is a DataParallel(.|\n)*`.module`"),
        ({"m": nn.LazyLinear(4)}, r"no shape yet for its 'weight'. Call the model once"),
    ],
    ids=["number", "name twice", "TorchScript", "DataParallel", "lazy"],
)
def test_what_is_no_variable(variables: dict[str, Any], message: str) -> None:
    refused(lambda: trace(lambda v, x: x, variables, torch.zeros(3)), message)


@pytest.mark.parametrize("feed", [{"x": 3}, {"x": np.zeros(3)}, {"x": "text"}])
def test_what_is_no_batch(feed: Any) -> None:
    refused(lambda: trace(lambda v, x: x, {"w": torch.zeros(3)}, feed), "batch entry 'x': expected a tensor")


# Optimizers.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "several times per step(.|\n)*AdamW"),
        (torch.optim.Adafactor, "reads its step counter in Python(.|\n)*AdamW"),
        (torch.optim.SparseAdam, "needs sparse gradients(.|\n)*torch.optim.SGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), "dampening=0"),
        (lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), "belongs to none of the named variables"),
    ],
    ids=["LBFGS", "Adafactor", "SparseAdam", "dampening", "other parameters"],
)
def test_optimizer(make: Callable[[Any], torch.optim.Optimizer], message: str) -> None:
    model = linear()
    optimizer = make(model.parameters())
    refused(lambda: trace(lambda v, x: x, {"": model, "optimizer": optimizer}, torch.ones(3, 4)), message)


def test_an_optimizer_that_is_not_named() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(v: dict[str, Any], x: Tensor) -> Any:
        model(x).sum().backward()
        optimizer.step()
        return x.sum()

    refused(lambda: trace(step, {"": model}, torch.ones(3, 4)), "SGD optimizer is not among the variables")


@pytest.mark.parametrize("kind", ["StepLR", "ReduceLROnPlateau", "OneCycleLR"])
def test_a_scheduler_inside_the_step(kind: str) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"StepLR": {"step_size": 1}, "OneCycleLR": {"max_lr": 0.1, "total_steps": 9}}
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **settings.get(kind, {}))

    def step(v: dict[str, Any], x: Tensor) -> Any:
        loss = model(x).sum()
        loss.backward()
        v["optimizer"].step()
        scheduler.step(*([loss] if kind == "ReduceLROnPlateau" else []))
        return loss

    refused(lambda: trace(step, {"": model, "optimizer": optimizer}, torch.ones(3, 4)), f"{kind}(.|\n)*`schedule`")
    optimizer.step()
    scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))  # outside it works as always


# Losses.


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, x: model(x), r"must return a scalar tensor(.|\n)*\[3, 4\](.|\n)*`.mean\(\)`"),
        (lambda model, x: 1.0, "must return a scalar tensor(.|\n)*got float"),
        (lambda model, x: x.sum(), "does not depend on any parameter(.|\n)*detach"),
        (lambda model, x: model(x).detach().sum(), "does not depend on any parameter"),
    ],
    ids=["not a scalar", "a number", "the batch alone", "detached"],
)
def test_loss(loss: Callable[[Any, Any], Any], message: str) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(lambda: training_graph(model, loss, optimizer, torch.ones(3, 4)), message)


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).pow(2).sum()


def test_reentrant_checkpointing_is_refused() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(lambda: training_graph(model, reentrant, optimizer, torch.ones(3, 4)), "use_reentrant=False")


# Operators.


def test_operators_that_lack_something() -> None:
    library = torch.library.Library("millrace_errors", "FRAGMENT")
    library.define("bare(Tensor x) -> Tensor")
    library.impl("bare", lambda x: x + 1, "CPU")

    @torch.library.custom_op("millrace_errors::changing", mutates_args={"x"})
    def changing(x: Tensor) -> None:
        x.add_(1)

    refused(lambda: traced(lambda v, x: torch.ops.millrace_errors.bare(x)), r"register_fake(.|\n)*custom-ops")
    refused(lambda: traced(lambda v, x: changing(v["w"]), w=torch.ones(2)), r"changing.default` changes an argument")


# Python beside the tensors.


class Remembering(nn.Module):
    """Counts its calls, keeps a cache and its last result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.calls = 0
        self.warm = False
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.warm = True
        if self.table is None:
            self.table = torch.arange(4.0)
        self.last = self.inner(x) + self.table
        return self.last


def test_numbers_that_a_module_changes_are_warned_of_and_set_back() -> None:
    model = Remembering()
    with pytest.warns(UserWarning, match="in Python, from") as caught:
        traced(lambda v, x: v["m"](x).sum(), m=model)
    messages = [str(w.message) for w in caught]
    assert any("module 'm' (Remembering): the step changes `calls` in Python, from 0 to 1" in m for m in messages)
    assert any('self.register_buffer("warm", torch.tensor(False))' in m for m in messages)
    assert all(Path(w.filename).name == HERE for w in caught)
    assert (model.calls, model.warm, model.table, hasattr(model, "last")) == (0, False, None, False)
    assert type(model(torch.randn(3, 4))) is Tensor  # nothing of the trace is left in it


def test_a_module_that_only_keeps_tensors_is_traced_without_a_word_and_again() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0)
            return self.inner(x) + self.table

    model = Keeping()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (traced(lambda v, x: v["m"](x).sum(), m=model) for _ in range(2))
    assert len(first.nodes) == len(second.nodes)


def test_a_tensor_kept_in_a_list_from_an_earlier_trace() -> None:
    kept: list[Tensor] = []

    def step(v: dict[str, Any], x: Tensor) -> Any:
        kept.append(x.mean())
        return torch.stack(kept).sum()

    traced(step)
    refused(lambda: traced(step), "in an earlier trace(.|\n)*return what is to be kept")


@pytest.mark.parametrize("how", ["module", "in place", "function"])
def test_what_torch_has_compiled_is_traced_as_it_was_written(how: str) -> None:
    plain, calls = linear(), []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return function(model(x)).sum()

    model: Any = plain
    function: Callable[[Tensor], Tensor] = torch.sin
    if how == "module":
        model = torch.compile(plain)
    elif how == "in place":
        model.compile()
    else:
        function = torch.compile(torch.sin)
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(3, 4))
    other = linear()
    expected = training_graph(
        other, lambda m, x: m(x).sin().sum(), torch.optim.SGD(other.parameters()), torch.ones(3, 4)
    )
    assert [n.target for n in graph.nodes] == [n.target for n in expected.nodes]
    assert calls == [1]


# Errors of the user's own.


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (lambda v, x: v[""](x[:, :2]), RuntimeError, "reduction dim|shapes cannot be multiplied|size mismatch"),
        (lambda v, x: x.view(5, 5), RuntimeError, "is invalid for input of size 12"),
        (lambda v, x: x[7], IndexError, "out of bounds"),
        (lambda v, x: {"a": x}["b"], KeyError, "b"),
        (lambda v, x: v[""].weights, AttributeError, "weights"),
        (lambda v, x: 1 / 0, ZeroDivisionError, "division"),
    ],
    ids=["shapes", "view", "index", "key", "attribute", "division"],
)
def test_an_error_of_the_users_own_keeps_its_type(body: Body, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        traced(body)
    assert type(caught.value) is kind
    notes = getattr(caught.value, "__notes__", [])
    assert any(re.search(rf"tracing the step, at .*{HERE}:\d+ in <lambda>", note) for note in notes)


def test_after_an_error_everything_is_as_before() -> None:
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    functions = (torch.manual_seed, torch.compile, F.scaled_dot_product_attention, torch.get_rng_state)

    def step(v: dict[str, Any], x: Tensor) -> Any:
        v[""](x).sum().backward()
        v["optimizer"].step()
        return x.sum().item()

    with pytest.raises(TraceError):
        trace(step, {"": model, "optimizer": optimizer}, torch.ones(3, 4))
    assert (torch.manual_seed, torch.compile, F.scaled_dot_product_attention, torch.get_rng_state) == functions
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()  # and it still trains by itself
    assert not torch.equal(model.weight, before["weight"][1])
