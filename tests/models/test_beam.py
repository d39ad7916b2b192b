"""Beam search against an exhaustive one, with its penalties, its batches and its allowed tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.errors import DataError, SettingError
from millrace.models.beam import Beam, Hypothesis, State, Step, beam_search
from millrace.models.trie import Trie

START, END, VOCABULARY, LONGEST, PLACES = 0, 1, 4, 3, 3


class Table:
    """A model with memory: what comes next depends on the source and on all tokens so far, by a random table."""

    def __init__(self, seed: int, sources: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        histories = VOCABULARY ** (LONGEST + 1)
        logits = torch.randn(sources, histories, VOCABULARY, generator=generator, dtype=torch.float64) * 2
        self.log_probs = logits.log_softmax(-1)
        attention = torch.randn(sources, histories, PLACES, generator=generator, dtype=torch.float64) * 2
        self.attention = attention.softmax(-1)
        self.sources = sources
        self.asked = 0

    def state(self) -> State:
        return {"source": torch.arange(self.sources), "history": torch.zeros(self.sources, dtype=torch.int64)}

    def step(self, tokens: Tensor, state: State) -> Step:
        self.asked += 1
        history = state["history"] * VOCABULARY + tokens
        source = state["source"]
        return Step(self.log_probs[source, history], {"history": history}, self.attention[source, history])

    def path(self, source: int, tokens: tuple[int, ...]) -> tuple[float, Tensor]:
        """The log-probability of tokens and the end, and the attention of each."""
        history, total, seen = 0, 0.0, []
        for before, after in itertools.pairwise((START, *tokens, END)):
            history = history * VOCABULARY + before
            total += float(self.log_probs[source, history, after])
            seen.append(self.attention[source, history])
        return total, torch.stack(seen)


def exhaustive(table: Table, source: int, beam: Beam) -> list[tuple[float, tuple[int, ...]]]:
    words = [token for token in range(VOCABULARY) if token != END]
    scored = []
    for length in range(beam.max_length + 1):
        for tokens in itertools.product(words, repeat=length):
            total, attention = table.path(source, tokens)
            coverage = sum(math.log(min(float(seen), 1.0)) for seen in attention.sum(0))
            normalizer = ((5 + length + 1) / 6) ** beam.length_penalty
            scored.append((total / normalizer + beam.coverage_penalty * coverage, tokens))
    return sorted(scored, reverse=True)


def found(table: Table, beam: Beam, **options: object) -> list[list[Hypothesis]]:
    return beam_search(table.step, table.state(), beam, sources=table.sources, **options)  # type: ignore[arg-type]


penalties = st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), penalties, penalties)
def test_a_wide_beam_is_an_exhaustive_search(seed: int, length_penalty: float, coverage_penalty: float) -> None:
    table = Table(seed)
    beam = Beam(START, END, 40, LONGEST, length_penalty, coverage_penalty)
    for source, hypotheses in enumerate(found(table, beam)):
        expected = exhaustive(table, source, beam)
        assert len(hypotheses) == len(expected) == 1 + 3 + 9 + 27
        assert [h.tokens for h in hypotheses] == [tokens for _, tokens in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), penalties)
def test_what_a_narrow_beam_says_of_its_hypotheses_is_so(seed: int, width: int, length_penalty: float) -> None:
    table = Table(seed)
    beam = Beam(START, END, width, LONGEST, length_penalty)
    for source, hypotheses in enumerate(found(table, beam)):
        assert 1 <= len(hypotheses) <= width
        assert len({h.tokens for h in hypotheses}) == len(hypotheses)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        best, _ = exhaustive(table, source, beam)[0]
        for hypothesis in hypotheses:
            total, attention = table.path(source, hypothesis.tokens)
            assert hypothesis.log_prob == pytest.approx(total)
            assert hypothesis.score <= best + 1e-9
            assert hypothesis.attention is not None
            assert hypothesis.attention.equal(attention)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_sources_do_not_disturb_each_other(seed: int, width: int) -> None:
    both = Table(seed)
    beam = Beam(START, END, width, LONGEST, 0.6, 0.2)
    together = found(both, beam)
    for source in range(2):
        alone = Table(seed)
        state = {name: part[source : source + 1] for name, part in alone.state().items()}
        assert [h.tokens for h in beam_search(alone.step, state, beam, sources=1)[0]] == [
            h.tokens for h in together[source]
        ]


def test_a_beam_of_one_is_greedy() -> None:
    table = Table(3, sources=1)
    history, tokens = 0, [START]
    while tokens[-1] != END and len(tokens) <= LONGEST:
        history = history * VOCABULARY + tokens[-1]
        tokens.append(int(table.log_probs[0, history].argmax()))
    greedy = tuple(token for token in tokens[1:] if token != END)
    candidates = [h.tokens for h in found(table, Beam(START, END, 1, LONGEST, 0.0))[0]]
    assert candidates[0] == greedy[: len(candidates[0])]


def test_longer_sequences_win_as_the_penalty_grows() -> None:
    table = Table(5, sources=1)
    lengths = [len(found(table, Beam(START, END, 40, LONGEST, penalty))[0][0].tokens) for penalty in (0.0, 1.0, 20.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2] == LONGEST


def test_padding_of_a_source_need_not_be_covered() -> None:
    def step(tokens: Tensor, state: State) -> Step:
        attention = torch.tensor([[0.5, 0.5, 0.0]]).expand(len(tokens), 3)
        return Step(torch.tensor([[-9.0, -0.5, -9.0]]).expand(len(tokens), 3), attention=attention)

    beam = Beam(START, END, 1, 2, 0.0, 1.0)
    mask = torch.tensor([[True, True, False]])
    padded = beam_search(step, {}, beam, sources=1, source_mask=mask)[0][0]
    assert padded.tokens == ()
    assert padded.score == pytest.approx(-0.5 + 2 * math.log(0.5))
    unpadded = beam_search(step, {}, beam, sources=1)[0][0]
    assert unpadded.score < padded.score - 10


def test_it_stops_when_nothing_better_can_come() -> None:
    asked = []

    def step(tokens: Tensor, state: State) -> Step:
        asked.append(1)
        return Step(torch.tensor([[0.001, 0.998, 0.001]]).log().expand(len(tokens), 3))

    assert beam_search(step, {}, Beam(START, END, 1, 50), sources=2)[1][0].tokens == ()
    assert len(asked) == 1


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sets(st.lists(st.sampled_from([0, 2, 3]), max_size=LONGEST).map(tuple), min_size=1, max_size=8),
)
def test_a_trie_lets_only_its_sequences_be_written(seed: int, sequences: set[tuple[int, ...]]) -> None:
    table = Table(seed)
    beam = Beam(START, END, 12, LONGEST, 0.6)
    for source, hypotheses in enumerate(found(table, beam, allowed=Trie(sequences, END).next_tokens)):
        expected = [tokens for _, tokens in exhaustive(table, source, beam) if tokens in sequences]
        assert [h.tokens for h in hypotheses] == expected


def test_a_trie_knows_its_prefixes() -> None:
    trie = Trie([(5, 6), (5,), (7,)], end=1)
    assert trie.next_tokens(()) == [5, 7]
    assert trie.next_tokens((5,)) == [1, 6]
    assert trie.next_tokens((6,)) == []
    with pytest.raises(DataError, match="must not hold its end"):
        Trie([(1,)], end=1)
    with pytest.raises(DataError, match="at least one"):
        Trie([], end=1)


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"max_length": 0}, {"length_penalty": -1.0}, {"coverage_penalty": -0.1}]
)
def test_a_wrong_beam_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="A beam needs"):
        Beam(START, END, **wrong)  # type: ignore[arg-type]
