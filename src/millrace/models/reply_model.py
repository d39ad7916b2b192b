"""Whether a message deserves a short reply, and which: a quick model before a slow one.

Source: Kannan et al., "Smart Reply: automated response suggestion for email", KDD 2016.
Shape suffixes: B messages, S subwords of a message, T of a reply, D features, V subwords in the vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.subwords import PAD, START
from millrace.models.lstm_encoder_decoder import LstmEncoderDecoder
from millrace.models.ngram_embedding import NgramEmbedding


class ReplyModel(nn.Module):
    """Two models that are trained at once and share nothing: the quick one decides whether the other is asked.

    Args:
        vocabulary: V.
        width: features of every layer of both.
        layers: of the writer's encoder, and of its decoder.
        dropout: share left out before every layer.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.trigger = Trigger(vocabulary, width, dropout)
        self.writer = LstmEncoderDecoder(vocabulary, vocabulary, width, layers, dropout)

    def forward(self, message_BS: Tensor, previous_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of whether a reply is due [B], and of its subwords [B, T, V]."""
        return self.trigger(message_BS), self.writer(message_BS, previous_BT)


class Trigger(nn.Module):
    """A feed-forward network on the mean of the embeddings of a message's subwords, and of pairs of them."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.one = nn.Embedding(vocabulary, width)
        self.two = NgramEmbedding([2], rows=4096, width=width)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def forward(self, message_BS: Tensor) -> Tensor:
        """Logits [B]."""
        seen_BS1 = (message_BS != PAD)[..., None]
        x_BSD = torch.cat([self.one(message_BS), self.two(functional.pad(message_BS, (1, 0), value=START))], dim=-1)
        mean_BD = (x_BSD * seen_BS1).sum(1) / seen_BS1.sum(1).clamp(min=1)
        return cast(Tensor, self.layers(mean_BD))[:, 0]
