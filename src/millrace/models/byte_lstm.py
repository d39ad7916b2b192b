"""An LSTM over the bytes of a text, whose state goes on from window to window, and what it says of a text.

Shape suffixes: B streams, L bytes of a window, K bytes before it, E features, H units of a layer, N layers, D numbers
of state, V byte values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from millrace.data.batches import Batches
from millrace.models.carried import CarriedState
from millrace.models.ngram_embedding import NgramEmbedding
from millrace.models.sampling import Sampling

BYTES = 256


class ByteLstm(nn.Module):
    """Bytes and the sequences that end with them, through an LSTM, and past it, to what comes next.

    Sources: Mikolov et al., "Recurrent neural network based language model", 2010, and "Strategies for training large
    scale neural network language models", 2011 (n-grams that lead to the output directly).
    """

    def __init__(
        self,
        streams: int,
        *,
        width: int,
        layers: int = 1,
        embedding: int = 32,
        orders: Sequence[int] = (),
        rows: int = 65536,
        dropout: float = 0.0,
    ) -> None:
        """Args: streams: that are read side by side. width: units of a layer. layers: of the LSTM. embedding: features
        of a byte, and of a sequence. orders: lengths of the sequences that have an embedding. rows: of each table of
        them. dropout: share of features left out before and after the LSTM."""
        super().__init__()
        self.byte = nn.Embedding(BYTES, embedding)
        nn.init.normal_(self.byte.weight, std=0.1)
        self.ngrams = NgramEmbedding(orders, rows, embedding) if orders else None
        features = embedding * (1 + len(orders))
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(features, width, layers, batch_first=True)
        self.readout = nn.Linear(width, BYTES)
        self.past = nn.Linear(features, BYTES, bias=False)
        self.carried = CarriedState(streams, 2 * layers * width)

    @property
    def before(self) -> int:
        """K: how many bytes before a window it looks at."""
        return self.ngrams.before if self.ngrams else 0

    def forward(self, inputs_BKL: Tensor, streams: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits [B, L, V] of the byte after each but the first K. `streams`: the numbers of those that the rows go on
        with, and whether they begin [B]; without, nothing is carried."""
        if streams is None:
            return self.after(inputs_BKL)[0]
        logits_BLV, state_BD = self.after(inputs_BKL, self.carried.read(*streams))
        self.carried.write(streams[0], state_BD)
        return logits_BLV

    def after(self, inputs_BKL: Tensor, state_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the state after the last byte; with a state of None it begins anew."""
        x_BLE = self.byte(inputs_BKL[:, self.before :])
        if self.ngrams is not None:
            x_BLE = torch.cat([x_BLE, self.ngrams(inputs_BKL)], dim=-1)
        x_BLE = self.dropout(x_BLE)
        y_BLH, state_BD = self._recurrent(x_BLE, state_BD)
        return self.readout(self.dropout(y_BLH)) + self.past(x_BLE), state_BD

    def _recurrent(self, x_BLE: Tensor, state_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, layers, width = len(x_BLE), self.lstm.num_layers, self.lstm.hidden_size
        if state_BD is None:
            state_BD = x_BLE.new_zeros(batch, 2 * layers * width)
        h_NBH, c_NBH = state_BD.to(x_BLE.dtype).view(batch, 2, layers, width).permute(1, 2, 0, 3).contiguous()
        y_BLH, (h_NBH, c_NBH) = self.lstm(x_BLE, (h_NBH, c_NBH))
        return y_BLH, torch.stack([h_NBH, c_NBH]).permute(2, 0, 1, 3).reshape(batch, -1)

    @torch.no_grad()
    def written(self, content: bytes, count: int, sampling: Sampling, generator: torch.Generator) -> list[int]:
        """Bytes that it draws one after the other, after some that are given."""
        device = self.byte.weight.device
        text = [0] * self.before + list(content)
        begin, state_BD = 0, None
        for _ in range(count):
            logits_BLV, state_BD = self.after(torch.tensor([text[begin:]], device=device), state_BD)
            begin = len(text) - self.before
            text.append(int(sampling.draw(logits_BLV[:, -1].float().cpu(), generator)))
        return text[-count:]


@torch.no_grad()
def log2_probabilities(model: ByteLstm, batches: Batches, *, carry: bool = True) -> Tensor:
    """Of every target of a pass over `stream_batches`, float64 [streams, bytes].

    Args:
        model: in evaluation mode; its carried state is left alone.
        batches: as `stream_batches` makes them.
        carry: begin a window with the state at the last one's end.
    """
    device = model.byte.weight.device
    state_BD: Tensor | None = None
    found = []
    for batch in batches.one_pass():
        begins = not carry or bool(batch["fresh"].all())
        logits_BLV, state_BD = model.after(batch["inputs"].to(device), None if begins else state_BD)
        log_BLV = logits_BLV.float().log_softmax(-1) / math.log(2)
        found.append(log_BLV.gather(-1, batch["targets"].to(device)[..., None])[..., 0].cpu().double())
    return torch.cat(found, dim=1)
