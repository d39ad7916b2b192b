"""A few different answers out of a search: the best of each of the best clusters, where those of one mean the same.

Source: Kannan et al., "Smart Reply: automated response suggestion for email", KDD 2016, §4 and §5.
Shape suffixes: B sources, S tokens of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor

from millrace.models.beam import Allowed, Hypothesis
from millrace.models.trie import Trie

Search: TypeAlias = Callable[[Tensor, Allowed], list[list[Hypothesis]]]  # sources [B, S], what may come next


class Offer(NamedTuple):
    """An answer that is offered."""

    tokens: tuple[int, ...]  # without the end
    cluster: str
    log_prob: float


def offers(
    search: Search, source_BS: Tensor, clusters: Mapping[tuple[int, ...], str], end: int, count: int
) -> list[list[Offer]]:
    """`count` answers to each source, of as many clusters, the likeliest first.

    Where the search sees fewer clusters, since its beam is full of answers that mean the same, it goes on without
    these, and what it finds comes after.

    Args:
        search: for the best of all sequences that are allowed, for each source, best first.
        source_BS: what is answered.
        clusters: of every sequence of tokens, without the end, that may be offered.
        end: the token that ends a sequence.
        count: of offers. There are fewer where there are fewer clusters, or the search finds nothing more.
    """
    found = _searched(search, source_BS, clusters, end, count)
    for row, those in enumerate(found):
        while len(those) < count:
            offered = {offer.cluster for offer in those}
            others = {tokens: cluster for tokens, cluster in clusters.items() if cluster not in offered}
            more = _searched(search, source_BS[row : row + 1], others, end, count - len(those))[0] if others else []
            if not more:
                break
            those += more
    return found


def _searched(
    search: Search, source_BS: Tensor, clusters: Mapping[tuple[int, ...], str], end: int, count: int
) -> list[list[Offer]]:
    """The best answer of each of the best clusters that one search sees, at most `count`."""
    trie = Trie(clusters, end)
    found = []
    for hypotheses in search(source_BS, trie.next_tokens):
        best: dict[str, Offer] = {}
        for hypothesis in hypotheses:
            cluster = clusters[hypothesis.tokens]
            best.setdefault(cluster, Offer(hypothesis.tokens, cluster, hypothesis.log_prob))
        found.append(list(best.values())[:count])
    return found
