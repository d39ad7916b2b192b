"""Running text as batches for skip-grams: blocks of words that are each other's contexts, with noise words beside them.

Pairs are not listed one by one: of a block of L words all L·L scores are one matrix product, and a mask says which of
them are pairs. So a word's two vectors are fetched once for all its pairs, and the words of a block share their noise.

Source: Mikolov et al., 2013, "Distributed representations of words and phrases and their compositionality"; noise that
is shared, so that scores are matrix products: Ji et al., 2016, "Parallelizing word2vec in shared and distributed
memory".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.data.batches import Batch
from millrace.data.indexed import IndexedBatches
from millrace.data.randomness import derived_seed
from millrace.data.vocabulary import Numbers
from millrace.errors import DataError

_NOISE_TABLE = 2**20  # entries, from which noise words are drawn evenly
_NOISE_POWER = 0.75  # of a word's count


def noise_chances(counts: Sequence[int]) -> npt.NDArray[np.float64]:
    """How often each word is drawn as noise: its count to the power of 3/4, as a share, [V]."""
    powers = np.asarray(counts, np.float64) ** _NOISE_POWER
    return powers / powers.sum()


def kept_shares(counts: Sequence[int], threshold: float) -> npt.NDArray[np.float64]:
    """With what chance an occurrence of each word is kept, [V]: of a word of frequency f it is √(t/f) + t/f, at most 1.

    Args: threshold: t, such as 1e-3; 0 keeps all.
    """
    shares = np.asarray(counts, np.float64)
    shares = shares / shares.sum()
    return np.minimum(np.sqrt(threshold / shares) + threshold / shares, 1.0) if threshold else np.ones_like(shares)


class SkipGramBatches(IndexedBatches):
    """Batches {"words", "sentences", "windows": [B, L], "noise": [B, K]}, all int64.

    An epoch goes through the text once. Which occurrences of frequent words it leaves out (before windows are laid, so
    that these reach further), how far each word's window reaches and what the noise is, follow from seed, epoch and the
    batch's number.
    """

    draws_global_random = False

    def __init__(
        self,
        words: Numbers,
        sentences: Numbers,
        counts: Sequence[int],
        *,
        batch_size: int,
        length: int,
        window: int,
        noise: int,
        threshold: float,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Args: words: [n], numbers of running words. sentences: [n], which sentence each is of; pairs are within one.
        counts: [V], of the whole text. batch_size: blocks. length: words of a block. window: the largest. noise: words
        for each block. threshold: of `kept_shares`.

        Raises: DataError: the text is shorter than one batch.
        """
        self._kept = kept_shares(counts, threshold)[words] if len(words) else np.zeros(0)
        count = int(self._kept.sum()) // length
        if count < 1:
            raise DataError(
                f"The text has {len(words)} known words, of which subsampling keeps about {self._kept.sum():.0f}, but "
                f"one block has length={length}. Give more text, or a higher subsample (0: all are kept)."
            )
        super().__init__("the text", count, min(batch_size, count), shuffle, seed, drop_last=shuffle)
        self.words, self.sentences = words, sentences
        self._length, self._window, self._noise = length, window, noise
        chances = np.cumsum(noise_chances(counts))
        self._table = np.searchsorted(chances, (np.arange(_NOISE_TABLE) + 0.5) / _NOISE_TABLE).astype(np.int64)
        self._identity |= {"words": len(words), "length": length, "window": window, "noise": noise}
        self._stream: tuple[int, Numbers, Numbers] | None = None

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        words, sentences = self._kept_words(epoch or 0)
        blocks, size = indices.numpy(), len(indices)
        random = np.random.default_rng(derived_seed("skipgram", self.seed, -1 if epoch is None else epoch, number))
        found = {
            "words": words[blocks],
            "sentences": sentences[blocks],
            "windows": random.integers(1, self._window + 1, (size, self._length)),
            "noise": self._table[random.integers(0, _NOISE_TABLE, (size, self._noise))],
        }
        return {name: torch.from_numpy(part) for name, part in found.items()}

    def _kept_words(self, epoch: int) -> tuple[Numbers, Numbers]:
        """The text of an epoch without what is left out, and its sentences, both [blocks, L]."""
        if self._stream is None or self._stream[0] != epoch:
            random = np.random.default_rng(derived_seed("kept", self.seed, epoch))
            kept = np.flatnonzero(random.random(len(self.words)) < self._kept)
            kept = np.resize(kept, (self.count, self._length))  # a little more or less than expected; it wraps around
            self._stream = epoch, self.words[kept], self.sentences[kept]
        return self._stream[1:]
