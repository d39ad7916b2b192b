"""A trained encoder-decoder in use: texts in, texts out, and where it looked.

Shape suffixes: B sentences, S subwords of a source, T of a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.data.batches import Batches
from millrace.data.placeholders import readable
from millrace.data.subwords import END, START, Subwords
from millrace.models.attention_picture import attention_picture
from millrace.models.beam import Beam, Hypothesis
from millrace.models.encoder_decoder import EncoderDecoder, search


class Translated(NamedTuple):
    """Texts of as many sentences."""

    sources: list[str]
    references: list[str]
    said: list[str]


@dataclass(frozen=True)
class Translator:
    """Translates by beam search; both sides are subwords of one vocabulary, and end with END."""

    model: EncoderDecoder  # in evaluation mode
    subwords: Subwords
    width: int  # hypotheses of the search
    length_penalty: float
    coverage_penalty: float

    def best(self, source_BS: Tensor) -> list[Hypothesis]:
        """The best translation of each source; none is longer than twice its source with its padding."""
        beam = Beam(START, END, self.width, 2 * source_BS.shape[1], self.length_penalty, self.coverage_penalty)
        return [found[0] for found in search(self.model, source_BS, beam)]

    def source(self, text: str) -> Tensor:
        """One text as a batch, [1, S]."""
        return torch.tensor([[*self.subwords.encode(text), END]])

    def text(self, best: Hypothesis) -> str:
        """What a hypothesis says."""
        return self.subwords.decode(best.tokens)

    def translated(self, batches: Batches) -> Translated:
        """A pass over batches {"source": [B, S], "target": [B, T]}."""
        found = Translated([], [], [])
        for batch in batches.one_pass():
            found.sources.extend(self.subwords.decode(row) for row in batch["source"].tolist())
            found.references.extend(self.subwords.decode(row) for row in batch["target"].tolist())
            found.said.extend(map(self.text, self.best(batch["source"])))
        return found

    def picture(self, source_S: Tensor, best: Hypothesis) -> Tensor:
        """Where the model looked while it wrote a translation, float [1, rows, cols] from 0 to 1."""
        read = [token for token in source_S.tolist() if token]
        assert best.attention is not None
        labels = ([readable(piece) or "END" for piece in self.subwords.pieces(t)] for t in ((*best.tokens, END), read))
        return attention_picture(best.attention[:, : len(read)], *labels)
