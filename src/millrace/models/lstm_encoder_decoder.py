"""A deep LSTM encoder-decoder with attention: every layer is a module, and so may have a device of its own.

Source: Wu et al., "Google's neural machine translation system", 2016, §3: the lowest layer reads in both directions,
layers above it add to what they get, and what the lowest layer of the decoder finds by attention goes to all above it.
Two things are added, without which a small one needs several times as many steps to find out where to look: what was
found is added to what the layers pass on, and both sides of the attention are normalized (Chen et al., "The best of
both worlds: combining recent advances in neural machine translation", 2018, §4.1).

Shape suffixes: B examples, S places of a source, T of a target, D features, L layers, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.errors import SettingError
from millrace.models.attention import Attention
from millrace.models.beam import State
from millrace.models.encoder_decoder import PAD, Decoded, EncoderDecoder


class LstmEncoderDecoder(EncoderDecoder):
    """As wide and deep as asked.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        width: D, of every layer; even, since two directions share it in the lowest layer of the encoder.
        layers: L, of the encoder and of the decoder; at least 2, since the lowest of the decoder is what attends.
        dropout: share of every layer's input left out in training.

    Raises: SettingError: the width is odd, or there are too few layers.
    """

    def __init__(
        self, source_vocabulary: int, target_vocabulary: int, width: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % 2 or layers < 2:
            raise SettingError(f"An LSTM encoder-decoder needs an even width and layers >= 2, got {width=}, {layers=}.")
        self.encoder = Encoder(source_vocabulary, width, layers, dropout)
        self.decoder = Decoder(target_vocabulary, width, layers, dropout)

    def encode(self, source_BS: Tensor) -> State:
        """The memory [B, S, D], and where it is not of padding."""
        return {"memory": self.encoder(source_BS), "seen": source_BS != PAD}

    def decode(self, previous_BT: Tensor, state: State) -> Decoded:
        """One or more tokens; the layers' states are [B, L, D]."""
        decoded: Decoded = self.decoder(previous_BT, state)
        return decoded


class Encoder(nn.Module):
    """Two directions first, then layers that read forwards."""

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.forwards = Layer(width, width // 2, dropout)
        self.backwards = Layer(width, width // 2, dropout)
        self.layers = nn.ModuleList(Layer(width, width, dropout) for _ in range(layers - 1))
        self.norm = nn.LayerNorm(width)

    def forward(self, source_BS: Tensor) -> Tensor:
        """Tokens to what is known about each, [B, S, D]."""
        x_BSD = self.embedding(source_BS)
        turned_BS = _turned((source_BS != PAD).sum(1), source_BS.shape[1])
        backwards = _picked(self.backwards(_picked(x_BSD, turned_BS))[0], turned_BS)
        x_BSD = torch.cat([self.forwards(x_BSD)[0], backwards], -1)
        for layer in self.layers:
            x_BSD = x_BSD + layer(x_BSD)[0]
        found: Tensor = self.norm(x_BSD)
        return found


class Decoder(nn.Module):
    """The lowest layer asks the memory; the layers above get its answer beside what comes from below."""

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width)
        widths = [width, *[2 * width] * (layers - 1)]
        self.layers = nn.ModuleList(Layer(inputs, width, dropout) for inputs in widths)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.readout = nn.Linear(width, vocabulary)

    def forward(self, previous_BT: Tensor, state: State) -> Decoded:
        """One or more tokens after those that led to the state."""
        first, *others = self.layers
        states = [_state_of(state, number) for number in range(len(self.layers))]
        x_BTD, states[0] = first(self.embedding(previous_BT), states[0])
        asked_BTD = self.attention_norm(x_BTD)
        found_BTD, weights_BTS = self.attention(asked_BTD, state["memory"], state["seen"][:, None])
        x_BTD = x_BTD + found_BTD
        for number, layer in enumerate(others, start=1):
            y_BTD, states[number] = layer(torch.cat([x_BTD, found_BTD], -1), states[number])
            x_BTD = x_BTD + y_BTD
        h_BLD, c_BLD = (torch.stack([layer[part] for layer in states if layer], 1) for part in (0, 1))
        return Decoded(self.readout(self.dropout(self.norm(x_BTD))), weights_BTS, {"h": h_BLD, "c": c_BLD})


class Layer(nn.LSTM):
    """An LSTM layer with dropout on its input: one module, so that a placement takes it as one."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__(inputs, width, batch_first=True)
        self.input_dropout = dropout

    def forward(  # type: ignore[override]  # of one layer, without the axis of layers
        self, x_BTI: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs [B, T, D], and the last h and c, [B, D] each; None begins with zeros."""
        began = None if state is None else (state[0][None].contiguous(), state[1][None].contiguous())
        x_BTI = functional.dropout(x_BTI, self.input_dropout, self.training)
        y_BTD, (h_1BD, c_1BD) = super().forward(x_BTI, began)
        return y_BTD, (h_1BD[0], c_1BD[0])


def _state_of(state: State, number: int) -> tuple[Tensor, Tensor] | None:
    """h and c of one layer; None before the first token."""
    return (state["h"][:, number], state["c"][:, number]) if "h" in state else None


def _turned(lengths_B: Tensor, places: int) -> Tensor:
    """Where each place is found when every sequence is read backwards and its padding stays behind it: [B, S]."""
    place_S = torch.arange(places, device=lengths_B.device)
    backwards_BS = lengths_B[:, None] - 1 - place_S
    return torch.where(backwards_BS >= 0, backwards_BS, place_S)


def _picked(x_BSD: Tensor, places_BS: Tensor) -> Tensor:
    return x_BSD.gather(1, places_BS[..., None].expand_as(x_BSD))
