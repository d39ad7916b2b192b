"""What can be asked of word vectors: which are near, what is to one as others are to each other, how they lie.

Shape suffixes: V words, D features, Q questions, N answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def nearest(
    vectors_VD: Tensor, wanted_QD: Tensor, count: int, leave_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The words whose vectors point most nearly where those that are wanted do.

    Args: leave_out: [Q, any], words that are no answers.

    Returns: words int64 [Q, N], the nearest first, and their cosines [Q, N]; N = count, or fewer where there are fewer.
    """
    cosines_QV = functional.normalize(wanted_QD, dim=-1) @ functional.normalize(vectors_VD, dim=-1).T
    if leave_out is not None:
        cosines_QV = cosines_QV.scatter(1, leave_out, -torch.inf)
    found = cosines_QV.topk(min(count, len(vectors_VD)), dim=-1)
    return found.indices, found.values


def completed(vectors_VD: Tensor, questions_Q3: Tensor, count: int = 1) -> Tensor:
    """What is to c as b is to a, for questions (a, b, c): the words nearest to b - a + c, without these three, [Q, N].

    Source: Mikolov et al., 2013, "Linguistic regularities in continuous space word representations".
    """
    a_QD, b_QD, c_QD = functional.normalize(vectors_VD, dim=-1)[questions_Q3].unbind(1)
    return nearest(vectors_VD, b_QD - a_QD + c_QD, count, leave_out=questions_Q3)[0]


def analogies_right(vectors_VD: Tensor, questions_Q4: Tensor) -> Tensor:
    """The share of analogies (a, b, c, d) of which the last word is found from the others."""
    return (completed(vectors_VD, questions_Q4[:, :3])[:, 0] == questions_Q4[:, 3]).float().mean()


def rank_correlation(one_P: Tensor, other_P: Tensor) -> Tensor:
    """Spearman's: the correlation of the ranks of two lists (equal values keep their order)."""
    ranks = [values.argsort().argsort().to(one_P.dtype) for values in (one_P, other_P)]
    a, b = (rank - rank.mean() for rank in ranks)
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def similarity_found(vectors_VD: Tensor, pairs_P2: Tensor, alike_P: Tensor) -> Tensor:
    """How well cosines rank pairs of words, against how alike these are known to be: a rank correlation."""
    one, other = functional.normalize(vectors_VD, dim=-1)[pairs_P2].unbind(1)
    return rank_correlation((one * other).sum(-1), alike_P)


def principal(vectors_ND: Tensor, count: int = 2) -> Tensor:
    """Vectors along their principal components, the widest first: [N, count]; zeros along those that they lack."""
    centred = vectors_ND - vectors_ND.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    # Which way a component points is arbitrary; its largest entry decides, so that pictures of one model are alike.
    signs = torch.gather(directions, 1, directions.abs().argmax(1, keepdim=True)).sign()
    found = centred @ (directions * signs).T
    return functional.pad(found, (0, count - found.shape[1]))
