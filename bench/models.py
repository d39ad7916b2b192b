"""The measured models in PyTorch, their batches, losses and optimizers; and how a worker gets hold of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch's optimizers import it in their first step; here it is in every worker's baseline
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads import WORKLOADS, Workload

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer of a causal transformer, normalized before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        split = self.qkv(self.norm1(x_BTD)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh"))


class Transformer(nn.Module):
    """A causal language model in the manner of GPT-2."""

    def __init__(self, vocabulary: int, tokens: int, layers: int, width: int, heads: int, tied: bool) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class Recurrent(nn.Module):
    """An LSTM language model; time is the first axis."""

    def __init__(self, vocabulary: int, layers: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_TB: Tensor) -> Tensor:
        return self.head(self.lstm(self.token(tokens_TB))[0])


def make_model(workload: Workload) -> nn.Module:
    """The model with its initial weights, the same ones every time."""
    torch.manual_seed(0)
    n = workload.sizes
    if workload.name == "mlp":
        return nn.Sequential(nn.Linear(n["inputs"], n["hidden"]), nn.ReLU(), nn.Linear(n["hidden"], n["classes"]))
    if workload.name == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128 * (n["side"] // 4) ** 2, n["classes"])),
        )
    if workload.name == "lstm":
        return Recurrent(n["vocabulary"], n["layers"], n["width"])
    return Transformer(n["vocabulary"], n["tokens"], n["layers"], n["width"], n["heads"], bool(n["tied"]))


def make_batch(workload: Workload) -> Batch:
    """Inputs and targets: noise, so that the loss has far to fall and every peer has to fall the same way."""
    torch.manual_seed(1)
    n = workload.sizes
    if "vocabulary" in n:
        shape = (n["tokens"], n["batch"]) if workload.name == "lstm" else (n["batch"], n["tokens"])
        return torch.randint(0, n["vocabulary"], shape), torch.randint(0, n["vocabulary"], shape)
    shape = (n["batch"], n["inputs"]) if "inputs" in n else (n["batch"], 3, n["side"], n["side"])
    return torch.randn(shape), torch.randint(0, n["classes"], (n["batch"],))


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def make_optimizer(workload: Workload, model: nn.Module, way: str = "default") -> torch.optim.Optimizer:
    """The workload's optimizer as PyTorch makes it by default, or as its "foreach" or "fused" implementation."""
    chosen: dict[str, Any] = {way: True} if way in ("foreach", "fused") else {}
    kind = torch.optim.SGD if workload.optimizer == "sgd" else torch.optim.AdamW
    return kind(model.parameters(), lr=workload.learning_rate, **chosen)


def export(workload: Workload, path: Path) -> None:
    """Write initial weights (by their names in the module) and the batch, for the peers of any framework."""
    inputs, targets = make_batch(workload)
    arrays = {name: tensor.numpy() for name, tensor in make_model(workload).state_dict().items()}
    np.savez(path, **arrays, **{"batch/inputs": inputs.numpy(), "batch/targets": targets.numpy()})


def load(task: dict[str, Any]) -> tuple[Workload, nn.Module, Batch]:
    """A worker's workload, model and batch, on the task's device, with exported weights; sets torch's threads."""
    torch.set_num_threads(task["threads"])
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32 for every peer
    workload = WORKLOADS[task["workload"]]
    model = make_model(workload)
    with np.load(task["weights"]) as arrays:
        stored = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    inputs, targets = stored.pop("batch/inputs"), stored.pop("batch/targets")
    model.load_state_dict(stored)
    device = torch.device(task["device"])
    return workload, model.to(device), (inputs.to(device), targets.to(device))


def autocast(task: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """bf16 by autocast where the task asks for it."""
    if task["precision"] == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(task["device"]).type, torch.bfloat16)


def versions() -> dict[str, str]:
    """Of torch, for a worker's report."""
    return {"torch": str(torch.__version__)}


def device_memory(task: dict[str, Any]) -> dict[str, Any]:
    """How a worker reads peak memory on a CUDA device; nothing on the CPU."""
    if not task["device"].startswith("cuda"):
        return {}
    return {
        "device_peak_bytes": torch.cuda.max_memory_allocated,
        "reset_device_peak": torch.cuda.reset_peak_memory_stats,
    }
