"""Training steps as people write them: in-place changes, buffers, averages of weights, functional transforms, uncommon
losses and layers. Each agrees with eager PyTorch to 1e-9 over five steps, in every fetch and every variable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn

from millrace.graph.trace import trace
from millrace.runtime.session import Session

from .against_eager import Given, Runner, Step, match_eager, training

DOUBLE = torch.float64
Program = tuple[Callable[[], Given], Step, list[Any]]


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def data(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=DOUBLE) for _ in range(3)]


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch) - 0.5).pow(2).mean()


def update(v: Given, loss: Tensor) -> dict[str, Tensor]:
    v["optimizer"].zero_grad()
    loss.backward()
    v["optimizer"].step()
    return {"loss": loss}


# Models, with an ordinary loss.


class Buffers(nn.Module):
    """Keeps a count, a queue that it rebinds, a ring that it writes by index, and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(3, 4))
        self.register_buffer("ring", torch.zeros(6, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.count += 1
        self.queue = torch.cat([y.detach()[:1], self.queue[:-1]])
        self.ring[(self.at + torch.arange(2)) % 6] = y.detach()[:2]
        self.at[0] = (self.at[0] + 2) % 6
        self.mean.copy_(y.detach().mean(0))
        return y + self.queue.mean(0) + self.mean * self.count + self.ring.clone().sum(0)


class Masked(nn.Module):
    """Attention with a causal mask, a padding mask, and weights asked for or not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[0, -1] = True
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        first, weights = self.attention(x, x, x, key_padding_mask=padded, attn_mask=causal, need_weights=True)
        second, _ = self.attention(x, x, x, key_padding_mask=padded, need_weights=False)
        return first + second + weights.mean()


class Cells(nn.Module):
    """Recurrent cells in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(4, 4), nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = g = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for row in x:
            h, c = self.lstm(row, (h, c))
            g = self.gru(h, g)
        return g


class Collected(nn.Module):
    """Parameters in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(3)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(4))})
        self.modules_by_name = nn.ModuleDict({"inner": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.several:
            x = x * factor
        return self.modules_by_name["inner"](x) + self.named["bias"]


class Sampler(nn.Module):
    """A learned affine resampling of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Parameter(torch.eye(2, 3) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.transform.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).t()


def with_symmetric_weight() -> nn.Module:
    model = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    return model


def with_hooks() -> nn.Module:
    """Hooks on modules and on parameters, forward and backward."""
    model = small()
    model[0].register_forward_pre_hook(lambda _module, arguments: (arguments[0] + 1,))
    model[0].register_forward_hook(lambda _module, _arguments, result: result * 2)
    model[1].register_full_backward_hook(lambda _module, gradients, _outer: (gradients[0] * 0.5,))
    model[2].weight.register_hook(lambda gradient: gradient * 0.1)

    def halve(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    model[2].bias.register_post_accumulate_grad_hook(halve)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "buffers": (Buffers, lambda: data(5, 4)),
    "attention masks": (Masked, lambda: data(2, 5, 4)),
    "cells": (Cells, lambda: data(3, 2, 4)),
    "collections": (Collected, lambda: data(5, 4)),
    "grid sample": (Sampler, lambda: data(2, 2, 6, 6)),
    "hooks": (with_hooks, lambda: data(5, 4)),
    "parametrization": (with_symmetric_weight, lambda: data(5, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 8)), lambda: data(5, 4)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 8)), lambda: data(5, 4)),
    "spectral norm as hook": (lambda: nn.utils.spectral_norm(nn.Linear(4, 8)), lambda: data(5, 4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), lambda: data(5, 4)),
    "embedding max norm": (
        lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 2)),
        lambda: [torch.randint(0, 6, (7,)) for _ in range(3)],
    ),
    "embedding bag": (
        lambda: nn.EmbeddingBag(6, 4, mode="max"),
        lambda: [torch.randint(0, 6, (3, 5)) for _ in range(3)],
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1, groups=2)
        ),
        lambda: data(2, 2, 5, 5),
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        lambda: data(2, 2, 5, 5),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(inplace=True), nn.MaxPool3d(2)),
        lambda: data(2, 1, 4, 4, 4),
    ),
    "norms and gates": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.PReLU(), nn.GLU(), nn.LayerNorm(4), nn.Softmax(-1)),
        lambda: data(3, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    model, batches = MODELS[name]
    match_eager(*training(model, square, momentum), batches())


# Losses, of an ordinary model.


def gradient_penalty(model: nn.Module, batch: Tensor) -> Tensor:
    x = batch.clone().requires_grad_()
    result = model(x).sum()
    (gradient,) = torch.autograd.grad(result, x, create_graph=True)
    return result / 10 + (gradient.norm(dim=1) - 1).pow(2).mean()


def learned_start(model: nn.Module, batch: Tensor) -> Tensor:
    """A gradient step inside the step (MAML)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    inner = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (batch[:2],)).pow(2).mean()
    gradients = torch.autograd.grad(inner, parameters, create_graph=True)
    moved = {n: p - 0.1 * g for n, p, g in zip(names, parameters, gradients, strict=True)}
    return (torch.func.functional_call(model, moved, (batch[2:],)) - 1).pow(2).mean()


def transforms(model: nn.Module, batch: Tensor) -> Tensor:
    jacobians = torch.vmap(torch.func.jacrev(model))(batch)
    _, tangent = torch.func.jvp(model, (batch,), (torch.ones_like(batch),))
    rows = torch.vmap(lambda x: model(x).softmax(0).pow(2).sum())(batch)
    hessian = torch.func.hessian(lambda x: model(x).sum())(batch[0])
    return jacobians.pow(2).mean() + tangent.pow(2).mean() + rows.mean() + hessian.pow(2).mean()


def writes(model: nn.Module, batch: Tensor) -> Tensor:
    """Indices, slices, masks, diagonals and views, written in place."""
    y = model(batch)
    counts = torch.zeros(3, 4, dtype=y.dtype).index_put_((torch.tensor([0, 1, 0, 2, 2]),), y, accumulate=True)
    z = y.clone()
    z[torch.tensor([0, 2])] = y[torch.tensor([1, 3])] * 2
    z[1, 1:3] = 0
    z[:, 0] += 1
    z.t()[1].mul_(2)
    z.view(-1)[::3].sub_(1)
    z.diagonal().add_(3)
    z[y > 0.5] = 0.25
    wide = z.clone().fill_diagonal_(0.5, wrap=True)
    return counts.pow(2).mean() + z.pow(2).mean() + wide.pow(2).mean()


def orders(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    index = y.argsort(1)
    picked = y.gather(1, index)
    scattered = torch.zeros_like(y).scatter_add(1, index, picked * torch.arange(4))
    largest = torch.zeros_like(y).scatter_reduce(1, index, picked, "amax", include_self=False)
    ranked = y.sort(1).values[:, 0] + y.topk(2, 1).values.sum(1) + y.kthvalue(2, 1).values + y.median(1).values
    summed = y.cumsum(0) + y.cumprod(1) + y.logcumsumexp(1) + y.cummax(0).values + y.cummin(1).values
    moved = y.roll(1, 0).tril().sum() + y.unfold(1, 2, 1).amax()
    return sum((t.pow(2).mean() for t in (scattered, largest, ranked, summed, moved)), torch.zeros(()))


def algebra(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    a = y.t() @ y + torch.eye(4, dtype=y.dtype)
    triangle = torch.linalg.cholesky(a)
    parts = [
        torch.linalg.svdvals(y).sum(),
        torch.logdet(a),
        torch.linalg.eigvalsh(a).max(),
        torch.linalg.eigvals(a).abs().sum(),
        torch.linalg.solve(a, batch[:4]).sum(),
        torch.cholesky_solve(batch[:4], triangle).mean(),
        torch.linalg.inv(a).trace(),
        torch.linalg.qr(a)[1].abs().mean(),
        torch.linalg.pinv(y).mean(),
        torch.matrix_exp(a / 100).mean(),
        torch.einsum("bi,ij,bj->b", y, a, batch).mean(),
    ]
    return torch.stack(parts).tanh().sum()


def waves(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    spectrum = torch.fft.fft(y) * torch.fft.fft(batch)
    frames = torch.stft(y.reshape(-1), 8, return_complex=True, window=torch.hann_window(8, dtype=y.dtype))
    angle = torch.view_as_real(torch.polar(y.abs() + 1, y)).pow(2).sum(-1).mean()
    return torch.fft.rfft(y).abs().pow(2).mean() + torch.fft.ifft(spectrum).real.mean() + frames.abs().mean() + angle


def criteria(model: nn.Module, batch: Tensor) -> Tensor:
    y, target, positive = model(batch), batch.argmax(1), (batch > 0).double()
    weight = torch.tensor([1.0, 2, 3, 4], dtype=y.dtype)
    parts = [
        F.nll_loss(y.log_softmax(1), target, weight=weight, ignore_index=2),
        F.cross_entropy(y, target, label_smoothing=0.1),
        F.binary_cross_entropy_with_logits(y, positive, pos_weight=weight),
        F.huber_loss(y, batch),
        F.kl_div(y.log_softmax(1), batch.softmax(1), reduction="batchmean"),
        F.cosine_embedding_loss(y, batch, torch.ones(len(y))),
        F.triplet_margin_loss(y, batch, batch.flip(0)),
        F.multi_margin_loss(y, target),
        F.gaussian_nll_loss(y, batch, y.exp()),
        nn.GaussianNLLLoss(full=True, eps=0.9, reduction="sum")(y, batch, y[:, 0].exp()) / 10,
        F.poisson_nll_loss(y, batch.abs()),
    ]
    return torch.stack(parts).sum()


def distributions(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    normal = torch.distributions.Normal(y[:, :2], F.softplus(y[:, 2:]))
    several = torch.distributions.MultivariateNormal(y.mean(0), torch.eye(4, dtype=y.dtype) * F.softplus(y.mean()))
    prior = torch.distributions.Normal(torch.zeros((), dtype=y.dtype), 1.0)
    divergence = torch.distributions.kl_divergence(normal, prior).mean()
    entropy = torch.distributions.Categorical(logits=y).entropy().mean()
    return divergence - normal.log_prob(batch[:, :2]).mean() - several.log_prob(batch).mean() - entropy


def images(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch).reshape(1, 1, 5, 4)
    scaled = [
        F.interpolate(y, scale_factor=2, mode="bilinear"),
        F.interpolate(y, size=(7, 5), mode="nearest"),
        F.interpolate(y, scale_factor=1.5, mode="bicubic", align_corners=True),
        F.interpolate(y, size=2, mode="bilinear", antialias=True),
        F.adaptive_avg_pool2d(y, 2),
        F.unfold(y, 2),
        F.pad(y, (1, 1, 1, 1), mode="reflect"),
        F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    ]
    return sum((image.pow(2).mean() for image in scaled), torch.zeros(()))


def clamped_gradient(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    y.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    with torch.no_grad():
        target = model(batch + 0.1)
    return (y - target.roll(1, 0)).pow(2).sum() + 1e-2 * torch.stack([p.norm(1) for p in model.parameters()]).sum()


class TripledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient * ctx.saved_tensors[0]


LOSSES: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "gradient penalty": gradient_penalty,
    "learned start": learned_start,
    "transforms": transforms,
    "writes": writes,
    "orders": orders,
    "algebra": algebra,
    "waves": waves,
    "criteria": criteria,
    "distributions": distributions,
    "images": images,
    "clamped gradient": clamped_gradient,
    "quantile": lambda model, batch: model(batch).quantile(0.3, dim=0).pow(2).sum(),
    "own autograd function": lambda model, batch: TripledGradient.apply(model(batch)).mean(),
    "sparse constant": lambda model, batch: torch.sparse.mm(torch.eye(5, dtype=DOUBLE).to_sparse(), model(batch)).std(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    if name == "quantile" and torch.__version__ < "2.12":
        pytest.skip("quantile reads values there")
    match_eager(*training(small, LOSSES[name], momentum), data(5, 4))


@pytest.mark.parametrize("kind", ["padded", "concatenated", "tuples"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_loss(kind: str, reduction: str) -> None:
    """Lengths from the batch or fixed; the fourth sequence is too short for its target, which costs nothing here."""
    rows = torch.tensor([[1, 2, 3], [2, 2, 1], [3, 1, 0], [1, 1, 1]])
    lengths = torch.tensor([3, 2, 1, 3])
    joined = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
    targets = joined if kind == "concatenated" else rows
    fixed = [(9, 9, 9, 9), (3, 2, 1, 3)]
    batches = [(x, torch.tensor([9, 7, 9, 4]), lengths) for x in data(9, 4, 4)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, *given = batch
        times, sizes = fixed if kind == "tuples" else given
        found = F.ctc_loss(model(x).log_softmax(-1), targets, times, sizes, reduction=reduction, zero_infinity=True)
        return found.pow(2).sum()

    match_eager(*training(linear, loss, momentum), batches)


# Whole steps.


def averaged() -> Program:
    """A running average of the weights, and one by state_dict with buffers."""

    def build() -> Given:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        average = copy.deepcopy(model).requires_grad_(False)
        return {"model": model, "average": average, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        found = update(v, (v["model"](batch) - v["average"](batch) + 1).pow(2).mean())
        with torch.no_grad():
            for mean, now in zip(v["average"].parameters(), v["model"].parameters(), strict=True):
                mean.mul_(0.9).add_(now, alpha=0.1)
            current = v["model"].state_dict()
            for name, value in v["average"].state_dict().items():
                if "running" in name:
                    value.lerp_(current[name], 0.5)
        return found

    return build, step, data(5, 4)


def two_losses() -> Program:
    def build() -> Given:
        model = small()
        groups = [{"params": [p], "lr": 10.0 ** -(i + 1)} for i, p in enumerate(model.parameters())]
        return {"": model, "optimizer": torch.optim.AdamW(groups)}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        out = v[""](batch)
        first, second = out[:, 0].pow(2).mean(), (out[:, 1] - 1).abs().mean()
        v["optimizer"].zero_grad(set_to_none=False)
        first.backward(retain_graph=True)
        second.backward()
        norm = nn.utils.clip_grad_norm_(v[""].parameters(), 0.5)
        nn.utils.clip_grad_value_(v[""].parameters(), 0.05)
        v["optimizer"].step()
        return {"first": first, "second": second, "norm": norm}

    return build, step, data(5, 4)


def sharpness_aware() -> Program:
    """Two gradients in a step, the weights moved and moved back (SAM), in pieces that accumulate."""

    def build() -> Given:
        model = small()
        return {"": model, "optimizer": momentum(model)}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        model, parameters = v[""], list(v[""].parameters())
        gradients = torch.autograd.grad(square(model, batch), parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient / (norm + 1e-12) * 0.05)
        v["optimizer"].zero_grad()
        total = torch.zeros((), dtype=batch.dtype)
        for piece in batch.chunk(2):
            loss = square(model, piece) / 2
            loss.backward()
            total += loss.detach()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient / (norm + 1e-12) * 0.05)
        v["optimizer"].step()
        return {"loss": total}

    return build, step, data(6, 4)


def by_data() -> Program:
    """`.data`, in all the ways there are; a second copy of a weight; weights clipped."""

    def build() -> Given:
        model = linear()
        return {"": model, "slow": model.weight.detach().clone()}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        model = v[""]
        loss = square(model, batch)
        loss.backward()
        model.weight.data = model.weight.data - 0.1 * model.weight.grad
        model.bias.data -= 0.1 * model.bias.grad.data
        model.bias.data.clamp_(-0.3, 0.3)
        v["slow"] = v["slow"] + 0.5 * (model.weight.detach() - v["slow"])
        model.weight.data.copy_(v["slow"])
        model.zero_grad()
        return {"loss": loss}

    return build, step, data(5, 4)


def functional_gradients() -> Program:
    """torch.func.grad of a functional call, and gradients for each example by vmap."""

    def build() -> Given:
        return {"": small()}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in v[""].named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(v[""], parameters, (x,)).pow(2).mean()

        gradients, value = torch.func.grad_and_value(loss)(parameters, batch)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch.unsqueeze(1))
        with torch.no_grad():
            for name, parameter in v[""].named_parameters():
                parameter.sub_(0.1 * gradients[name] + 0.1 * each[name].clamp(-0.1, 0.1).mean(0))
        return {"loss": value}

    return build, step, data(5, 4)


def complex_weights() -> Program:
    def build() -> Given:
        model = nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))})
        return {"m": model, "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2)}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        return update(v, (batch.to(torch.complex128) @ v["m"]["w"]).abs().tanh().pow(2).mean())

    return build, step, data(5, 4)


def tensors_by_hand() -> Program:
    """Plain tensors that change places, are overwritten in part, and whose old values are fetched."""

    def build() -> Given:
        square_ = torch.zeros(4, 4, dtype=DOUBLE)
        return {"a": torch.randn(4, dtype=DOUBLE), "b": torch.randn(4, dtype=DOUBLE), "square": square_}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        v["a"], v["b"] = v["b"], v["a"] * 0.5 + batch[0]
        before = v["square"].clone()
        v["square"][0] += v["a"]
        v["square"].t()[1].copy_(batch[1])
        v["square"].fill_diagonal_(1.0)
        v["square"][1:3, 1:].clamp_(-0.1, 0.1)
        return {"before": before, "row": v["square"][0].clone(), "sum": v["a"].sum()}

    return build, step, data(4, 4)


def rates_in_the_step() -> Program:
    """A learning rate that the step itself lowers; two updates in a step."""

    def build() -> Given:
        model = linear()
        rate = torch.tensor(0.1, dtype=DOUBLE)
        return {"": model, "optimizer": torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)}

    def step(v: Given, batch: Tensor) -> dict[str, Tensor]:
        update(v, square(v[""], batch))
        for group in v["optimizer"].param_groups:
            group["lr"] = group["lr"] * 0.9
        return update(v, square(v[""], batch))

    return build, step, data(5, 4)


STEPS = [
    averaged,
    two_losses,
    sharpness_aware,
    by_data,
    functional_gradients,
    complex_weights,
    tensors_by_hand,
    rates_in_the_step,
]


@pytest.mark.parametrize("program", STEPS, ids=lambda program: program.__name__)
def test_step(program: Callable[[], Program]) -> None:
    build, step, batches = program()
    match_eager(build, step, batches)


def test_fetches_may_be_numbers_nothing_and_nests() -> None:
    def step(v: Given, batch: Tensor) -> Any:
        return {"count": 3, "nothing": None, "nest": [batch.sum(), (batch.mean(), {"deep": v["w"]})]}

    got = Runner(trace(step, {"w": torch.ones(2)}, torch.ones(3))).step(torch.full((3,), 2.0))
    assert {name: value.sum().item() for name, value in got.items()} == {
        "count": 3,
        "nest.0": 6,
        "nest.1.0": 2,
        "nest.1.1.deep": 2,
    }


def test_one_tensor_in_two_places_of_the_example_is_two_feeds() -> None:
    words, others = torch.randn(3, 4), torch.randn(3, 4)
    graph = trace(lambda _, batch: {"sum": batch[0] + 2 * batch[1]}, {}, (words, words))
    assert torch.equal(Session(graph, compile="eager").run("sum", (words, others)), words + 2 * others)
