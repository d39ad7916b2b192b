"""Drawing the next token from what a model says of it: temperature, the k likeliest, the nucleus.

Shape suffixes: B rows, L tokens of a window, V in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from millrace.errors import SettingError


@dataclass(frozen=True)
class Sampling:
    """How to draw. What is left after `top_k` is what `top_p` chooses from.

    Raises: SettingError: a number is out of its range.
    """

    temperature: float = 1.0  # divides the logits: below 1 the likely become likelier, 0 always takes the likeliest
    top_k: int = 0  # only so many of the likeliest may be drawn; 0 allows all
    # Only the likeliest that together have this probability may be drawn (Holtzman et al., "The curious case of neural
    # text degeneration", 2020); 1 allows all.
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise SettingError(
                f"Sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, but got temperature="
                f"{self.temperature}, top_k={self.top_k}, top_p={self.top_p}."
            )

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The probability of every token to be drawn, [B, V]; the rows add up to 1."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).to(logits_BV.dtype)
        # From the largest on, since dividing by a small temperature may leave the range of floats.
        below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        probabilities_BV = (below_BV / self.temperature).softmax(-1)
        sorted_BV, token_BV = torch.sort(probabilities_BV, dim=-1, descending=True, stable=True)
        if self.top_k:
            sorted_BV = sorted_BV.clone()
            sorted_BV[..., self.top_k :] = 0
        if self.top_p < 1:
            share_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
            likelier_BV = share_BV.cumsum(-1) - share_BV  # what all before it have; of the first one 0, so it stays
            sorted_BV = sorted_BV * (likelier_BV < self.top_p)
        kept_BV = torch.zeros_like(probabilities_BV).scatter(-1, token_BV, sorted_BV)
        return kept_BV / kept_BV.sum(-1, keepdim=True)

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """A token for every row, int64 [B].

        Args:
            logits_BV: on the generator's device.
            generator: of the random draws; it is left alone at temperature 0.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        return torch.multinomial(self.probabilities(logits_BV), 1, generator=generator)[:, 0]


@torch.no_grad()
def continued(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    count: int,
    window: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Tokens that a model draws one after the other, each from what it says about the last `window` ones.

    Args:
        model: tokens [1, L] to logits [1, L, V].
        tokens: [n], at least one, on the CPU; what to go on from.
        count: how many to draw.
        window: the longest L that the model takes.
        temperature: divides the logits; 0 takes the likeliest.
        generator: of the random draws.

    Returns: the new tokens, [count].
    """
    device = next(model.parameters()).device if isinstance(model, nn.Module) else tokens.device
    sampling, start = Sampling(temperature), len(tokens)
    for _ in range(count):
        logits_1V = model(tokens[None, -window:].to(device))[:, -1].float().cpu()
        tokens = torch.cat([tokens, sampling.draw(logits_1V, generator)])
    return tokens[start:]
