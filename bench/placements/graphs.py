"""The eight graphs: a training step of each model, of full size, traced on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.placements.models import ExpertTransformer, Perceptron, Translator, TwoTowers
from millrace.graph.graph import Graph
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.training import training_graph

try:
    import timm
    import transformers
except (ImportError, RuntimeError):
    # Beside a CPU build of torch the index's torchvision, which both import, asks for two operators that nobody has
    # declared. No model here calls them. The object is kept, because dropping it would take them away again.
    _DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    import transformers

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A step to place.

    what: in words, for the report. branchy: whether it has work that can go on side by side. exact: whether the integer
    program can take it (in few groups and one microbatch).
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    microbatches: int
    branchy: bool = False
    exact: bool = True
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


def build(workload: Workload) -> Graph:
    """Trace a workload: on the device "meta", so that neither weights nor values take memory or time."""
    graph = microbatch(_trace(workload, 1), workload.microbatches)
    return prune(graph, ["loss"], graph.updates)


def build_part(workload: Workload) -> Graph:
    """The step of one microbatch alone."""
    return _trace(workload, workload.microbatches)


def _trace(workload: Workload, parts: int) -> Graph:
    with torch.device("meta"):
        model, batch = workload.model(), tuple(tensor[: len(tensor) // parts] for tensor in workload.batch())
    optimizer = workload.optimizer(model.parameters(), lr=1e-4)
    graph = training_graph(model, workload.loss or _cross_entropy, optimizer, batch)
    return sparse_rows(prune(graph, ["loss"], graph.updates))


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Of the last axis of what the model makes of all but the last tensor of the batch."""
    scores = model(*batch[:-1])
    return F.cross_entropy(scores.flatten(0, -2), batch[-1].flatten())


def _hub_cross_entropy(model: Any, batch: Batch) -> Tensor:
    scores = model(input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def _t5_cross_entropy(model: Any, batch: Batch) -> Tensor:
    source, target, words = batch
    scores = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    return F.cross_entropy(scores.flatten(0, -2), words.flatten())


def _integers(*shapes: tuple[int, ...]) -> Callable[[], Batch]:
    return lambda: tuple(torch.zeros(shape, dtype=torch.int64) for shape in shapes)


def _images(examples: int, side: int) -> Callable[[], Batch]:
    return lambda: (torch.zeros(examples, 3, side, side), torch.zeros(examples, dtype=torch.int64))


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(dropout_rate=0.0))  # the small one


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "gpt2",
            "GPT-2 small, 32 texts of 1,024 tokens",
            _gpt2,
            _integers((32, 1024), (32, 1024)),
            microbatches=8,
            loss=_hub_cross_entropy,
        ),
        Workload(
            "lstm",
            "LSTM encoder and decoder of 4 layers each, width 1,024, 256 pairs of 20 words, attention in every step",
            lambda: Translator(32_000, 4, 1024),
            _integers((256, 20), (256, 20), (256, 20)),
            microbatches=4,
            branchy=True,
            exact=False,  # as many tasks as time steps
        ),
        Workload(
            "inception",
            "Inception v3, 256 images of 299 × 299",
            lambda: timm.create_model("inception_v3"),
            _images(256, 299),
            microbatches=4,
            branchy=True,
        ),
        Workload(
            "resnet50",
            "ResNet-50, 256 images of 224 × 224",
            lambda: timm.create_model("resnet50"),
            _images(256, 224),
            microbatches=8,
        ),
        Workload(
            "two_towers",
            "two towers, tables of 100 and 10 million rows, batch 8,192",
            lambda: TwoTowers(100_000_000, 10_000_000, 24, 4096, 64),
            _integers((8192, 24), (8192, 24), (8192,)),
            microbatches=1,
            branchy=True,
            optimizer=torch.optim.SGD,
        ),
        Workload(
            "experts",
            "causal transformer of 4 layers, width 1,024, 8 experts in each, 32 texts of 512 tokens",
            lambda: ExpertTransformer(32_000, 4, 1024, 16, 8),
            _integers((32, 512), (32, 512)),
            microbatches=4,
            branchy=True,
        ),
        Workload(
            "mlp",
            "perceptron of 12 layers, width 8,192, batch 4,096",
            lambda: Perceptron(4096, 8192, 12, 1000),
            lambda: (torch.zeros(4096, 4096), torch.zeros(4096, dtype=torch.int64)),
            microbatches=8,
        ),
        Workload(
            "t5",
            "T5 small, 64 pairs of 512 and 128 tokens",
            _t5,
            _integers((64, 512), (64, 128), (64, 128)),
            microbatches=4,
            loss=_t5_cross_entropy,
        ),
    )
}
