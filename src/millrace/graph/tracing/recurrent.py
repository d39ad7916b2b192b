"""Recurrent modules of several layers, layer by layer, so that each layer can be on a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.graph.tracing.lstm import fits, lstm

RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def recurrent(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call of `torch.lstm`, `torch.gru` or a plain recurrence, of padded sequences, with the results of that call.

    The layers of a module "rnn" run in the scopes "rnn.l0", "rnn.l1", …, as its weights are called.
    """
    if len(arguments) != 9 or not isinstance(arguments[3], bool) or arguments[4] == 1:
        return _call(function, *arguments)
    x, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first = arguments
    directions, count = (2 if bidirectional else 1), len(weights) // layers
    sequence = x.transpose(0, 1) if batch_first else x
    last: list[Sequence[Tensor]] = []
    for layer in range(layers):
        if layer and dropout and train:
            sequence = F.dropout(sequence, dropout)
        start = layer * directions
        own = [t[start : start + directions] for t in _listed(state)]
        sequence, *ends = _Layer(layer, function)(
            sequence,
            own if isinstance(state, list | tuple) else own[0],
            weights[layer * count : (layer + 1) * count],
            *(has_biases, 1, 0.0, train, bidirectional, False),
        )
        last.append(ends)
    results = (torch.cat(ends) for ends in zip(*last, strict=True))
    return (sequence.transpose(0, 1) if batch_first else sequence, *results)


class _Layer(nn.Module):
    """One layer; being a module, it gives the scope."""

    def __init__(self, index: int, function: Callable[..., Any]) -> None:
        super().__init__()
        self._index, self._function = index, function

    def forward(self, *arguments: Any) -> Any:
        return _call(self._function, *arguments)

    def _get_name(self) -> str:
        return f"l{self._index}"


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return lstm(*arguments) if function is torch.lstm and fits(arguments) else function(*arguments)


def _listed(state: Any) -> Sequence[Tensor]:
    return state if isinstance(state, list | tuple) else [state]
