"""From one sequence to another: what all encoder-decoders have in common, learning and searching with them.

Shape suffixes: B examples, S places of a source, T of a target, V tokens in the vocabulary, N rows of a beam.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.models.beam import Allowed, Beam, Hypothesis, State, Step, beam_search

PAD = 0  # the token that fills what is shorter than its batch, in sources and in targets


@dataclass(frozen=True)
class Decoded:
    """What a decoder says about the tokens after those that it was given."""

    logits: Tensor  # [B, T, V]
    attention: Tensor  # [B, T, S], to the source
    state: State  # of the decoder: give it back, beside the encoder's, to go on


class EncoderDecoder(nn.Module, abc.ABC):
    """A model that reads a source, [B, S] tokens with PAD after each, and writes a target token by token."""

    @abc.abstractmethod
    def encode(self, source_BS: Tensor) -> State:
        """What the decoder needs to know about sources; "seen" is where they are not padding, bool [B, S]."""

    @abc.abstractmethod
    def decode(self, previous_BT: Tensor, state: State) -> Decoded:
        """What comes after each of some tokens that follow those decoded before with the same state."""

    def forward(self, source_BS: Tensor, previous_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the tokens that come after the previous ones, as `shifted` makes them."""
        return self.decode(previous_BT, self.encode(source_BS)).logits

    def step(self, tokens_N: Tensor, state: State) -> Step:
        """One token more, for `beam_search`."""
        decoded = self.decode(tokens_N[:, None], state)
        return Step(decoded.logits[:, 0].float().log_softmax(-1), decoded.state, decoded.attention[:, 0])


def shifted(target_BT: Tensor, start: int) -> Tensor:
    """What the decoder is given while it learns (teacher forcing): the start, then the target without its last."""
    first_B1 = torch.full_like(target_BT[:, :1], start)
    return torch.cat([first_B1, target_BT[:, :-1]], 1)


def sequence_loss(logits_BTV: Tensor, target_BT: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per token of the targets, without padding; `smoothing` spreads that share over all tokens."""
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


def token_accuracy(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """The share of the targets' tokens that are the likeliest ones, without padding."""
    real_BT = target_BT != PAD
    return ((logits_BTV.argmax(-1) == target_BT) & real_BT).sum() / real_BT.sum()


@torch.no_grad()
def search(
    model: EncoderDecoder, source_BS: Tensor, beam: Beam, allowed: Allowed | None = None
) -> list[list[Hypothesis]]:
    """The best targets for each source, best first; see `beam_search`.

    Args: source_BS: on any device; the model is taken as it is, so put it in evaluation mode before.
    """
    state = model.encode(source_BS.to(next(model.parameters()).device))
    return beam_search(model.step, state, beam, sources=len(source_BS), source_mask=state["seen"], allowed=allowed)
