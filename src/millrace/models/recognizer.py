"""A network that hears letters in features of sound, and what can be read from it.

Shape suffixes: B utterances, F frames, T steps of the network, M bands of the features, V letters and the blank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.models.ctc import BLANK, WordTree, beam_search, greedy


class Recognizer(nn.Module):
    """Two convolutions, of which one takes `stride` frames to a step, an LSTM in both directions, one linear layer.

    Its symbols are the blank, 0, and the letters: letter i is symbol i + 1. `words` are those that `words_of` may say.

    Source: Graves, Mohamed and Hinton, "Speech recognition with deep recurrent neural networks", ICASSP 2013.
    """

    def __init__(
        self, letters: str, words: Sequence[str], bands: int, stride: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.letters, self.stride = letters, stride
        symbol = {letter: number for number, letter in enumerate(letters, 1)}
        self._words = WordTree([[symbol[letter] for letter in word] for word in words], symbol[" "])
        self.hear = nn.Conv1d(bands, width, kernel_size=5, padding=2)
        self.shorten = nn.Conv1d(width, width, kernel_size=2 * stride + 1, stride=stride, padding=stride)
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(2 * width, len(letters) + 1)

    def forward(self, features_BFM: Tensor) -> Tensor:
        """Log-probabilities [B, T, V], where T is F / stride, rounded up."""
        x_BDT = functional.gelu(self.shorten(functional.gelu(self.hear(features_BFM.transpose(1, 2)))))
        x_BTD, _ = self.lstm(self.dropout(self.norm(x_BDT.transpose(1, 2))))
        return cast(Tensor, self.readout(self.dropout(x_BTD)).log_softmax(-1))

    def steps(self, frames: Tensor) -> Tensor:
        """How many steps so many frames have."""
        return (frames + self.stride - 1) // self.stride

    @torch.no_grad()
    def heard(self, features_BFM: Tensor, frames: Tensor) -> list[Tensor]:
        """Log-probabilities [T, V] of each utterance on the CPU, without those of padding. `frames`: [B], of each."""
        path_BTV = self(features_BFM.to(self.readout.weight.device)).float().cpu()
        steps = self.steps(frames).tolist()
        return [path_TV[:count] for path_TV, count in zip(path_BTV, steps, strict=True)]

    def text(self, symbols: Iterable[int]) -> str:
        """The letters of symbols; blanks, and padding, have none."""
        return "".join(self.letters[symbol - 1] for symbol in symbols if symbol != BLANK)

    def letters_of(self, path_TV: Tensor) -> str:
        """What the likeliest path says, letter by letter."""
        return self.text(greedy(path_TV))

    def words_of(self, path_TV: Tensor) -> str:
        """What is likeliest to be said, of the words that are known."""
        return self.text(beam_search(path_TV, 12, self._words))

    def picture(self, features_FM: Tensor, path_TV: Tensor) -> Tensor:
        """The spectrogram, low tones below, over the probabilities of blank and letters, [1, rows, F + 3]."""
        loud = ((features_FM.T.flip(0) + 2) / 4).clamp(0, 1)
        said = path_TV.exp().repeat_interleave(self.stride, 0)[: len(features_FM)].T
        return functional.pad(torch.cat([loud, said]), (0, 3, 0, 3), value=1.0)[None]
