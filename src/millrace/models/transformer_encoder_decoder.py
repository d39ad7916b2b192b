"""A transformer encoder-decoder with normalization before each sublayer.

Source: Vaswani et al., "Attention is all you need", 2017; Xiong et al., "On layer normalization in the transformer
architecture", 2020, for where it is normalized.

Shape suffixes: B examples, S places of a source, T of a target, D features, V tokens in the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.models.attention import Attention, causal
from millrace.models.beam import State
from millrace.models.encoder_decoder import PAD, Decoded, EncoderDecoder


class TransformerEncoderDecoder(EncoderDecoder):
    """As wide and deep as asked.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        width: D, even.
        layers: of the encoder and of the decoder.
        heads: of every attention; must divide the width.
        dropout: share of every sublayer's result left out in training.

    Raises: SettingError: the heads do not divide the width.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(source_vocabulary, width, layers, heads, dropout)
        self.decoder = Decoder(target_vocabulary, width, layers, heads, dropout)

    def encode(self, source_BS: Tensor) -> State:
        """The memory [B, S, D], and where it is not of padding."""
        seen_BS = source_BS != PAD
        return {"memory": self.encoder(source_BS, seen_BS), "seen": seen_BS}

    def decode(self, previous_BT: Tensor, state: State) -> Decoded:
        """One or more tokens; the state is all tokens so far, [B, T], which are read anew every time."""
        prefix_BT = torch.cat([state["prefix"], previous_BT], 1) if "prefix" in state else previous_BT
        logits_BTV, weights_BTS = self.decoder(prefix_BT, state["memory"], state["seen"])
        latest = previous_BT.shape[1]
        return Decoded(logits_BTV[:, -latest:], weights_BTS[:, -latest:], {"prefix": prefix_BT})


class Encoder(nn.Module):
    """Every place looks at all others."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, source_BS: Tensor, seen_BS: Tensor) -> Tensor:
        """Tokens to what is known about each, [B, S, D]."""
        x_BSD = with_places(self.embedding(source_BS))
        for layer in self.layers:
            x_BSD = layer(x_BSD, seen_BS[:, None])
        found: Tensor = self.norm(x_BSD)
        return found


class Decoder(nn.Module):
    """Every place looks at those before it, and at the source."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocabulary)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, previous_BT: Tensor, memory_BSD: Tensor, seen_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] of what comes next, and how the last layer looks at the source, [B, T, S]."""
        x_BTD = with_places(self.embedding(previous_BT))
        weights_BTS = torch.zeros(())
        for layer in self.layers:
            x_BTD, weights_BTS = layer(x_BTD, memory_BSD, seen_BS[:, None])
        return self.readout(self.norm(x_BTD)), weights_BTS


class EncoderLayer(nn.Module):
    """Attention to the sequence itself, then a transformation of every place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = Mlp(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, seen: Tensor) -> Tensor:
        """[B, S, D] to the same."""
        asked = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.dropout(self.attention(asked, asked, seen)[0])
        return x_BSD + self.dropout(self.mlp(x_BSD))


class DecoderLayer(nn.Module):
    """Attention to what came before, attention to the source, then a transformation of every place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before_norm, self.before = nn.LayerNorm(width), Attention(width, heads)
        self.source_norm, self.source = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = Mlp(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] to the same, and the weights of the source, [B, T, S]."""
        asked, places = self.before_norm(x_BTD), x_BTD.shape[1]
        x_BTD = x_BTD + self.dropout(self.before(asked, asked, causal(places, places, x_BTD.device))[0])
        found_BTD, weights_BTS = self.source(self.source_norm(x_BTD), memory_BSD, seen)
        x_BTD = x_BTD + self.dropout(found_BTD)
        return x_BTD + self.dropout(self.mlp(x_BTD)), weights_BTS


class Mlp(nn.Module):
    """A normalization and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        found: Tensor = self.narrow(functional.gelu(self.wide(self.norm(x_BTD)), approximate="tanh"))
        return found


def with_places(x_BTD: Tensor) -> Tensor:
    """Embeddings at the size of 1 per feature, and beside them waves that tell the place (Vaswani et al., §3.5)."""
    _, places, width = x_BTD.shape
    rate_W = torch.exp(torch.arange(0, width, 2, device=x_BTD.device) * (-math.log(10000.0) / width))
    angle_TW = torch.arange(places, device=x_BTD.device)[:, None] * rate_W
    waves_TD = torch.stack([angle_TW.sin(), angle_TW.cos()], -1).flatten(1)
    return x_BTD * width**0.5 + waves_TD.to(x_BTD.dtype)
