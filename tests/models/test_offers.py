"""Offers, over searches that know their order: one of each cluster, the best, and a search again for more."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.models.beam import Allowed, Hypothesis
from millrace.models.offers import Search, offers

END = 0
SEQUENCES = [(token, *rest) for token in range(1, 6) for rest in ((), (1,), (2, 3))]


def searching(orders: list[list[int]], width: int) -> Search:
    """A beam that finds the first `width` of the allowed sequences, in an order of each source's own."""

    def search(source_B1: Tensor, allowed: Allowed) -> list[list[Hypothesis]]:
        def is_allowed(tokens: tuple[int, ...]) -> bool:
            return all(token in allowed(tokens[:place]) for place, token in enumerate(tokens)) and END in allowed(
                tokens
            )

        found = []
        for source in source_B1[:, 0].tolist():
            order = [SEQUENCES[number] for number in orders[source] if is_allowed(SEQUENCES[number])]
            found.append([Hypothesis(tokens, -float(n), -float(n), None) for n, tokens in enumerate(order[:width])])
        return found

    return search


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.permutations(range(len(SEQUENCES))), min_size=1, max_size=3),
    st.lists(st.sampled_from("abcde"), min_size=len(SEQUENCES), max_size=len(SEQUENCES)),
    st.integers(1, 4),
    st.integers(1, len(SEQUENCES)),
)
def test_they_are_the_best_of_the_best_clusters_however_narrow_the_beam(
    orders: list[list[int]], named: list[str], count: int, width: int
) -> None:
    clusters = dict(zip(SEQUENCES, named, strict=True))
    sources = torch.arange(len(orders))[:, None]
    found = offers(searching(orders, width), sources, clusters, END, count)
    assert len(found) == len(orders)
    for order, offered in zip(orders, found, strict=True):
        best: dict[str, tuple[int, ...]] = {}
        for number in order:
            best.setdefault(clusters[SEQUENCES[number]], SEQUENCES[number])
        assert [(offer.tokens, offer.cluster) for offer in offered] == [(t, c) for c, t in best.items()][:count]


def test_what_may_not_be_offered_is_not() -> None:
    clusters = {(1,): "a", (2, 2, 3): "b"}
    (offered,) = offers(searching([list(range(len(SEQUENCES)))], 3), torch.zeros(1, 1).long(), clusters, END, 3)
    assert [offer.tokens for offer in offered] == [(1,), (2, 2, 3)]


def test_a_search_that_finds_nothing_more_ends_it() -> None:
    (offered,) = offers(lambda source, allowed: [[]], torch.zeros(1, 1), {(1,): "a"}, END, 3)
    assert offered == []
