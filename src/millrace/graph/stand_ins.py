"""Functions of torch that are others while a step is traced, because what they do has no place in a graph.

They are put in place by name, since a mode that intercepts calls (`replace_calls.py`) does not see those that torch's
own Python functions make, such as attention inside `multi_head_attention_forward`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.transformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from millrace.errors import TraceError
from millrace.graph.random import RandomStream
from millrace.graph.user_code import user_line

ATTENTION = F.scaled_dot_product_attention
# Positions of arguments: (query, key, value, mask, dropout, …) and (weight, indices, offsets, scale, mode, sparse, …).
_DROPOUT_OF_ATTENTION = 4
_SPARSE_OF_BAG = 5


@contextlib.contextmanager
def stand_ins(random: RandomStream) -> Iterator[None]:
    """Put the stand-ins in place; the originals are back on leaving."""
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        *_generator_state(random),
        (torch, "compile", _compile),
        (torch, "manual_seed", _manual_seed),
        (torch, "embedding", _embedding),
        (torch, "embedding_bag", _embedding_bag),
        (F, "scaled_dot_product_attention", attention),
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


def _manual_seed(seed: int) -> Any:
    raise TraceError(
        f"{user_line()}: torch.manual_seed inside the step would draw the same numbers in every step. Leave it out: "
        'the step\'s own random stream is the variable "random", seeded by `seed`, and the same seed repeats a run.'
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


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """nn.Transformer compares the mask's values with a causal one's, for speed alone: the mask is used anyway."""
    return is_causal is True
