"""Functions of torch that are others while a step is traced, because what they do has no place in a graph.

They are put in place by name, since a mode that intercepts calls (`replace_calls.py`) does not see those that torch's
own Python functions make, such as attention inside `multi_head_attention_forward`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributions
import torch.nn.functional as F
import torch.nn.modules.transformer
import torch.optim.lr_scheduler
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from millrace.errors import TraceError
from millrace.graph.random import RandomStream
from millrace.graph.tracing.ctc import ctc_loss
from millrace.graph.tracing.user_code import user_line

ATTENTION, GAUSSIAN_LOSS, RRELU = F.scaled_dot_product_attention, F.gaussian_nll_loss, F.rrelu
# Positions of arguments: (query, key, value, mask, dropout, …) and (weight, indices, offsets, scale, mode, sparse, …).
_DROPOUT_OF_ATTENTION = 4
_SPARSE_OF_BAG = 5


@contextlib.contextmanager
def stand_ins(random: RandomStream) -> Iterator[None]:
    """Put the stand-ins in place; the originals are back on leaving."""
    replaced: list[tuple[Any, str, Any]] = [
        *_generator_state(random),
        (torch, "compile", _compile),
        *((place, name, _seed) for place, name in _SEEDING),
        *((kind, "step", _scheduler_step) for kind in _SCHEDULERS),
        (torch.utils.checkpoint, "CheckpointFunction", _Reentrant),
        (torch.distributions.Distribution, "_validate_args", False),  # it looks at values
        (torch, "embedding", _embedding),
        (torch, "embedding_bag", _embedding_bag),
        (F, "scaled_dot_product_attention", attention),
        (F, "gaussian_nll_loss", gaussian_nll_loss),
        (F, "rrelu", rrelu),
        (torch, "ctc_loss", ctc_loss),
        (torch.nn.modules.transformer, "_detect_is_causal_mask", _is_causal),
    ]
    saved = [getattr(place, name) for place, name, _ in replaced]
    try:
        for place, name, function in replaced:
            setattr(place, name, function)
        yield
    finally:
        for (place, name, _), original in zip(replaced, saved, strict=True):
            setattr(place, name, original)


def _generator_state(random: RandomStream) -> list[tuple[Any, str, Callable[..., Any]]]:
    """While tracing, the state of "the generator" is the number of draws so far.

    torch.utils.checkpoint saves the generator's state before a block and restores it before recomputing the block;
    with the counter in its place the recomputed operators get the numbers, and so the masks, of the first time.
    """
    get_state, set_state = torch.get_rng_state, torch.set_rng_state
    main = threading.get_ident()

    def get() -> Any:
        return _Draws(random.draws) if threading.get_ident() == main else get_state()

    def set_(state: Any) -> None:
        if isinstance(state, _Draws):
            random.draws = state.count
        else:
            set_state(state)

    return [(torch, "get_rng_state", get), (torch, "set_rng_state", set_)]


@dataclasses.dataclass(frozen=True)
class _Draws:
    count: int


def _compile(model: Any = None, **_: Any) -> Any:
    """torch.cond and its kin call torch.compile, whose own tracing has no place inside this one."""
    return model if model is not None else lambda function: function


_SEEDING = (
    (torch, "manual_seed"),
    (torch, "seed"),
    (torch.cuda, "manual_seed"),
    (torch.cuda, "manual_seed_all"),
    (torch.random, "manual_seed"),
)


def _seed(*_: Any) -> Any:
    raise TraceError(
        f"{user_line()}: seeding the generator (torch.manual_seed, torch.seed) inside the step would draw the same "
        "numbers in every step, or do nothing. Leave it out: "
        'the step\'s own random stream is the variable "random", seeded by `seed`, and the same seed repeats a run.'
    )


class _Reentrant:
    """In the place of the function behind reentrant checkpointing."""

    @staticmethod
    def apply(*_: Any) -> Any:
        raise TraceError(
            f"{user_line()}: reentrant checkpointing runs a backward pass of its own inside the backward pass, and the "
            "gradients of parameters pass by those who ask for them by name.\n"
            "  Way out: torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


_SCHEDULERS = [
    kind
    for kind in vars(torch.optim.lr_scheduler).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler) and "step" in vars(kind)
]


def _scheduler_step(scheduler: Any, *_: Any, **__: Any) -> None:
    raise TraceError(
        f"{user_line()}: {type(scheduler).__name__} counts steps in Python, and a graph runs no Python: the rate "
        "would be that of the first step for ever.\n  Ways out: give the factor at step n as `schedule`, to fit or "
        'training_graph; or step the scheduler outside and assign its rate to the variable "optimizer/lr".'
    )


_original_embedding, _original_embedding_bag = torch.embedding, torch.embedding_bag


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """A sparse gradient is a Python object, not a node: the gradient is dense in the graph."""
    return _original_embedding(weight, indices, padding_idx, scale_grad_by_freq, False)


def _embedding_bag(*args: Any, **kwargs: Any) -> Any:
    if len(args) > _SPARSE_OF_BAG:
        args = (*args[:_SPARSE_OF_BAG], False, *args[_SPARSE_OF_BAG + 1 :])
    return _original_embedding_bag(*args, **{**kwargs, **({"sparse": False} if "sparse" in kwargs else {})})


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """The fused kernels draw their dropout masks from a generator inside the kernel; the unfused one draws in ATen."""
    dropout = args[_DROPOUT_OF_ATTENTION] if len(args) > _DROPOUT_OF_ATTENTION else kwargs.get("dropout_p", 0.0)
    if dropout:
        with sdpa_kernel(SDPBackend.MATH):
            return ATTENTION(*args, **kwargs)
    return ATTENTION(*args, **kwargs)


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """Without the look at the variances' signs; otherwise as torch's. A negative variance counts as `eps`."""
    variance = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    if variance.ndim == input.ndim - 1 and variance.shape == input.shape[:-1]:
        variance = variance.unsqueeze(-1)  # one for each row
    # As torch's, the bound is no step on the way of the gradient.
    bounded = variance + (variance.clamp(min=eps) - variance).detach()
    loss = 0.5 * (bounded.log() + (input - target) ** 2 / bounded)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """The kernel draws its slopes from a hidden generator; here they are drawn from the step's stream."""
    slope = lower + (upper - lower) * torch.rand_like(input) if training else (lower + upper) / 2
    result = torch.where(input >= 0, input, input * slope)
    return input.copy_(result) if inplace else result


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """nn.Transformer compares the mask's values with a causal one's, for speed alone: the mask is used anyway."""
    return is_causal is True
