"""Models of every kind, traced as whole training steps, agree with eager PyTorch over five steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from millrace.graph.graph import info
from millrace.graph.signature import Role
from millrace.graph.trace import trace

from .against_eager import Runner, importable_torchvision, match_eager, training

mostly_double = pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.long)], ids=["f64", "f32"]
)
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def labelled(*shape: int, dtype: torch.dtype, classes: int = 4, count: int = 3) -> list[Any]:
    return [(torch.randn(*shape, dtype=dtype), torch.randint(0, classes, shape[:1])) for _ in range(count)]


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Recurrent(nn.Module):
    """A recurrent network that reads a sequence and classifies it."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.cells = kind(6, 8, batch_first=True, **settings)
        self.out = nn.Linear(16 if settings.get("bidirectional") else 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


@both_precisions
def test_mlp(dtype: torch.dtype) -> None:
    match_eager(*training(mlp, classify), labelled(16, 8, dtype=dtype), dtype=dtype)


@both_precisions
@pytest.mark.parametrize("bias", [False, True])
def test_cnn_with_batchnorm(dtype: torch.dtype, bias: bool) -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=bias),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, stride=2, groups=2),
            nn.BatchNorm2d(8, momentum=0.3),
            nn.Flatten(),
            nn.Linear(8, 4),
        )

    runner = match_eager(*training(model, classify, momentum), labelled(16, 3, 8, 8, dtype=dtype), dtype=dtype)
    buffers = {v.name for v in runner.graph.variables if v.role is Role.BUFFER}
    assert buffers == {f"{layer}.{b}" for layer in "15" for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert buffers <= set(runner.graph.updates)
    assert int(runner.variables["1.num_batches_tracked"]) == 5


def test_batchnorm_in_eval_mode_keeps_its_statistics() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16).eval(), nn.ReLU(), nn.Linear(16, 4))

    runner = match_eager(*training(model, classify), labelled(16, 8, dtype=torch.float64))
    assert not any(name.startswith("1.running") for name in runner.graph.updates)


@both_precisions
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    build, step = training(lambda: Recurrent(kind, num_layers=2), classify)
    match_eager(build, step, labelled(4, 3, 6, dtype=dtype), dtype=dtype)


def test_bidirectional_lstm_with_projection() -> None:
    def model() -> nn.Module:
        return nn.Sequential(Recurrent(nn.LSTM, bidirectional=True))

    match_eager(*training(model, classify), labelled(4, 3, 6, dtype=torch.float64))


@both_precisions
def test_transformer(dtype: torch.dtype) -> None:
    def model() -> nn.Module:
        return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(batch[1].shape[1])
        return (model(batch[0], batch[1], tgt_mask=mask) - batch[1]).pow(2).mean()

    batches = [(torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 4, 16, dtype=dtype)) for _ in range(2)]
    match_eager(*training(model, loss, momentum), batches, dtype=dtype)


# Tiny models of the transformers library, each with its own loss.


def _gpt2(dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **rates, **ends))


def _bert(dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes, **rates))


def _t5(dropout: float) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=50, dropout_rate=dropout, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


def _llama(dropout: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(
        vocab_size=50, num_key_value_heads=1, max_position_embeddings=16, attention_dropout=dropout, **sizes
    )
    return LlamaForCausalLM(config)


language_models = pytest.mark.parametrize("make", [_gpt2, _bert, _t5, _llama])


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def text(mask: bool) -> list[dict[str, Tensor]]:
    batches = []
    for _ in range(2):
        ids = torch.randint(1, 50, (2, 6))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if mask:
            batch["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        batches.append(batch)
    return batches


@language_models
@mostly_double
def test_language_model(make: Callable[[float], nn.Module], dtype: torch.dtype) -> None:
    importable_torchvision()
    build, step = training(lambda: make(0.0), own_loss)
    # In float64 with a padding mask, in float32 without: the models take other paths then.
    match_eager(build, step, text(mask=dtype == torch.float64), dtype=dtype)


@pytest.mark.long
@language_models
def test_language_model_with_dropout(make: Callable[[float], nn.Module]) -> None:
    importable_torchvision()
    build, step = training(lambda: make(0.3), own_loss, lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    batch = text(mask=False)[0]
    given = build()
    runner, again, other = (Runner(trace(step, given, batch, seed=seed)) for seed in (1, 1, 2))
    losses = [float(runner.step(batch)["loss"]) for _ in range(3)]
    assert losses == [float(again.step(batch)["loss"]) for _ in range(3)]
    assert len(set(losses) | {float(other.step(batch)["loss"])}) == 4
    given[""].eval()
    # Dropout only adds noise around the loss without it.
    assert losses[0] == pytest.approx(own_loss(given[""], batch).item(), rel=0.3)


# Image models of the timm library. Those with BatchNorm over few values are ill-conditioned: with larger rates
# or fewer images, eager PyTorch itself ends elsewhere when its weights change by one part in 1e16.


@pytest.mark.parametrize(
    ("name", "settings", "size", "rate"),
    [
        ("resnet18", {}, 32, 1e-3),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, 1e-3),
        pytest.param("efficientnet_b0", {}, 64, 1e-5, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
@mostly_double
def test_image_model(name: str, settings: dict[str, Any], size: int, rate: float, dtype: torch.dtype) -> None:
    importable_torchvision()
    import timm

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)

    build, step = training(lambda: timm.create_model(name, num_classes=4, **settings), classify, optimizer)
    match_eager(build, step, labelled(4, 3, size, size, dtype=dtype, count=2), dtype=dtype)


# Training techniques.


def test_tied_weights_are_one_variable() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids).mean(1))

    batches = [(torch.randint(0, 20, (8, 5)), torch.randint(0, 20, (8,))) for _ in range(3)]
    runner = match_eager(*training(Tied, classify), batches)
    assert [v.name for v in runner.graph.variables if v.role is Role.PARAMETER] == ["embed.weight"]


def test_frozen_parameters_are_inputs_without_updates() -> None:
    def model() -> nn.Module:
        made = mlp()
        made[0].requires_grad_(False)
        return made

    runner = match_eager(*training(model, classify), labelled(16, 8, dtype=torch.float64))
    parameters = {v.name for v in runner.graph.variables if v.role is Role.PARAMETER}
    assert parameters == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not {"0.weight", "0.bias"} & set(runner.graph.updates)
    assert not any(v.name.startswith("optimizer/0.") for v in runner.graph.variables)


def test_parameter_groups_keep_their_own_settings() -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": model[0].parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": model[2].parameters(), "lr": 1e-2, "betas": (0.8, 0.9)},
        ]
        return torch.optim.AdamW(groups)

    runner = match_eager(*training(mlp, classify, optimizer), labelled(16, 8, dtype=torch.float64))
    rates = {n: float(t) for n, t in runner.variables.items() if n.endswith("/lr")}
    assert rates == {"optimizer/group0/lr": 1e-3, "optimizer/group1/lr": 1e-2}


class Checkpointed(nn.Module):
    """Recomputes its first block in the backward pass."""

    def __init__(self, dropout: float = 0.0, on: bool = True) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.out = nn.Linear(8, 4)
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.on else self.block(x)
        return self.out(hidden)


@both_precisions
def test_activation_checkpointing(dtype: torch.dtype) -> None:
    match_eager(*training(Checkpointed, classify), labelled(16, 8, dtype=dtype), dtype=dtype)


def test_autocast_bf16() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    runner = match_eager(
        *training(mlp, loss, momentum), labelled(16, 8, dtype=torch.float32), dtype=torch.float32, variables_within=1e-5
    )
    dtypes = {n.meta["val"].dtype for n in runner.graph.nodes if "mm" in str(n.target)}
    assert dtypes == {torch.bfloat16}
    assert {v.spec.dtype for v in runner.graph.variables if v.role is Role.PARAMETER} == {torch.float32}


def test_two_optimizers_of_an_adversarial_pair() -> None:
    def build() -> dict[str, Any]:
        g = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        d = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        adam = [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in (g, d)]
        return {"g": g, "d": d, "opt_g": adam[0], "opt_d": adam[1]}

    def step(v: dict[str, Any], batch: Any) -> dict[str, Tensor]:
        real, noise = batch
        fake = v["g"](noise)
        yes, no = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        score = F.binary_cross_entropy_with_logits
        loss_d = score(v["d"](real), yes) + score(v["d"](fake.detach()), no)
        v["opt_d"].zero_grad()
        loss_d.backward()
        v["opt_d"].step()
        loss_g = score(v["d"](fake), yes)  # the discriminator after its update
        v["opt_g"].zero_grad()
        loss_g.backward()
        v["opt_g"].step()
        return {"d": loss_d, "g": loss_g}

    double = torch.float64
    batches = [(torch.randn(8, 2, dtype=double), torch.randn(8, 4, dtype=double)) for _ in range(3)]
    runner = match_eager(build, step, batches)
    assert {info(n).variable for n in runner.graph.nodes} >= {"g.0.weight", "d.0.weight"}


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_embedding_gradient(name: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Flatten(), nn.Linear(40, 4))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(model.parameters(), lr=0.1)

    batches = [(torch.randint(0, 20, (8, 5)), torch.randint(0, 4, (8,))) for _ in range(3)]
    match_eager(*training(model, classify, optimizer), batches)


def test_a_step_written_by_hand_with_plain_tensors() -> None:
    def build() -> dict[str, Any]:
        return {"W": torch.zeros(8, 4, requires_grad=True), "b": torch.zeros(4, requires_grad=True)}

    def step(v: dict[str, Any], batch: Any) -> dict[str, Tensor]:
        loss = F.cross_entropy(batch[0] @ v["W"] + v["b"], batch[1])
        dW, db = torch.autograd.grad(loss, [v["W"], v["b"]])
        v["W"] = v["W"] - 0.1 * dW
        with torch.no_grad():
            v["b"] -= 0.1 * db
        return {"loss": loss, "size": {"of_gradient": dW.norm()}}

    runner = match_eager(build, step, labelled(16, 8, dtype=torch.float64))
    assert list(runner.graph.fetches) == ["loss", "size.of_gradient"]


def test_gradient_of_a_gradient() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        score = model(x).logsumexp(1).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        return F.cross_entropy(model(x), batch[1]) + slope.pow(2).sum(1).mean()

    def smooth() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    match_eager(*training(smooth, loss), labelled(16, 8, dtype=torch.float64))
