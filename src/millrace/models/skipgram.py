"""Skip-gram: two vectors for every word, such that words and their contexts score high and noise scores low.

Shape suffixes: B blocks, L words of a block, K noise words of a block, D features, V words in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.skipgram import noise_chances


class SkipGram(nn.Module):
    """Word vectors, and the vectors by which words are scored as contexts; lookups alone read them.

    So their gradients are those of the rows of a batch, which is all that plain SGD and parameter servers touch.
    """

    log_chances: Tensor  # [V], of being drawn as noise

    def __init__(self, counts: Sequence[int], width: int) -> None:
        """Args: counts: [V], of every word in the text. width: features of a word."""
        super().__init__()
        self.words = nn.Embedding(len(counts), width, sparse=True)
        self.contexts = nn.Embedding(len(counts), width, sparse=True)
        nn.init.uniform_(self.words.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)
        self.register_buffer("log_chances", torch.from_numpy(noise_chances(counts)).log().float(), persistent=False)

    def forward(self, words_BL: Tensor, noise_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of every word of a block with every other as its context, [B, L, L], and with its noise, [B, L, K]."""
        word_BLD = self.words(words_BL)
        scores = word_BLD @ self.contexts(torch.cat([words_BL, noise_BK], 1)).transpose(1, 2)
        length = words_BL.shape[1]
        return scores[..., :length], scores[..., length:]


def pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Which words of a block are contexts of which: 1 where the second is in the window of the first, [B, L, L]."""
    places = torch.arange(batch["words"].shape[1], device=batch["words"].device)
    distance_LL = (places[:, None] - places).abs()
    near = (distance_LL > 0) & (distance_LL <= batch["windows"][:, :, None])
    return (near & (batch["sentences"][:, :, None] == batch["sentences"][:, None, :])).float()


def negative_sampling(model: SkipGram, batch: Mapping[str, Tensor], negatives: float) -> Tensor:
    """Tell contexts from noise, each by itself; the mean over running words.

    Args: negatives: how many noise words weigh as much as one context; a block's noise is weighted so.

    Source: Mikolov et al., 2013, "Distributed representations of words and phrases…", equation 4.
    """
    context_BLL, noise_BLK = model(batch["words"], batch["noise"])
    pair_BLL = pairs(batch)
    weight_BL1 = pair_BLL.sum(-1, keepdim=True) * (negatives / noise_BLK.shape[-1])
    loss = (pair_BLL * functional.softplus(-context_BLL)).sum() + (weight_BL1 * functional.softplus(noise_BLK)).sum()
    return loss / batch["words"].numel()


def sampled_softmax(model: SkipGram, batch: Mapping[str, Tensor]) -> Tensor:
    """Tell a context among noise: cross-entropy over it and the block's noise, whose scores are lowered by how likely
    they were drawn; the mean over running words.

    Source: Jean et al., 2015, "On using very large target vocabulary for neural machine translation", section 3.
    """
    context_BLL, noise_BLK = model(batch["words"], batch["noise"])
    chance = model.log_chances
    context_BLL = context_BLL - chance[batch["words"]][:, None, :]
    noise_BLK = noise_BLK - (chance[batch["noise"]])[:, None, :]
    among_BL1 = noise_BLK.logsumexp(-1, keepdim=True)
    return (pairs(batch) * functional.softplus(among_BL1 - context_BLL)).sum() / batch["words"].numel()
