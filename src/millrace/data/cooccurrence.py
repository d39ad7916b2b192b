"""Which words are alike, by the company that they keep in a text: what word vectors are measured against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millrace.data.vocabulary import Numbers

_CONTEXT_POWER = 0.75  # of a context's count, so that rare contexts do not outweigh all others


def similarities(
    words: Numbers, sentences: Numbers, size: int, *, window: int, most: int
) -> tuple[Numbers, npt.NDArray[np.float32]]:
    """Every two of a text's most frequent words, and how alike their contexts are.

    A word is the row of its positive pointwise mutual information with every word of the vocabulary in a window around
    it; two are as alike as the cosine of their rows.

    Args: words: [n], running words. sentences: [n], which sentence each is of. size: V, of the vocabulary. window:
        words to either side. most: how many words to compare.

    Returns: pairs int64 [P, 2], similarities float32 [P], from 0 to 1.

    Source: Levy and Goldberg, 2014, "Neural word embedding as implicit matrix factorization".
    """
    frequent = np.sort(np.argsort(-np.bincount(words, minlength=size), kind="stable")[:most])
    row = np.full(size, -1)
    row[frequent] = np.arange(len(frequent))
    counts = np.zeros((len(frequent), size))
    for distance in range(1, window + 1):
        together = sentences[distance:] == sentences[:-distance]
        left, right = words[:-distance][together], words[distance:][together]
        for word, context in ((left, right), (right, left)):
            wanted = row[word] >= 0
            np.add.at(counts, (row[word[wanted]], context[wanted]), 1.0)
    rows = _positive_information(counts)
    lengths = np.linalg.norm(rows, axis=1)
    cosines = rows @ rows.T / np.maximum(np.outer(lengths, lengths), 1e-12)
    first, second = np.triu_indices(len(frequent), 1)
    return np.stack([frequent[first], frequent[second]], 1), cosines[first, second].astype(np.float32)


def _positive_information(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """max(0, log p(context | word) / p(context)) of counts [words, contexts]."""
    contexts = counts.sum(0) ** _CONTEXT_POWER
    chance = contexts / max(contexts.sum(), 1e-12)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(share / chance)
    return np.where(counts > 0, np.maximum(information, 0.0), 0.0)
