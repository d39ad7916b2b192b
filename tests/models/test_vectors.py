"""Questions to word vectors whose answers are known, and pictures of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from millrace.data.vocabulary import WordVocabulary
from millrace.errors import DataError
from millrace.models.vectors import analogies_right, completed, nearest, principal, rank_correlation, similarity_found
from millrace.models.word_vectors import WordVectors, terms

WORDS = ("hot", "hotter", "big", "bigger", "rome")
VECTORS = torch.tensor([[1, 0, 0.0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [-1, -1, -1]])


def test_the_nearest_point_the_same_way() -> None:
    words, cosines = nearest(VECTORS, torch.tensor([[5.0, 0, 0]]), 2)
    assert words.tolist() == [[0, 1]]
    assert cosines[0].tolist() == pytest.approx([1, 0.5**0.5])
    assert nearest(VECTORS, VECTORS[:1], 9, leave_out=torch.tensor([[0]]))[0][0].tolist()[:4] == [1, 2, 3, 4]


def test_analogies_are_sums_without_the_words_asked_with() -> None:
    questions = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 4]])
    assert completed(VECTORS, questions[:, :3])[:, 0].tolist() == [3, 2, 3]
    assert float(analogies_right(VECTORS, questions)) == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=40, unique=True), st.randoms())
def test_rank_correlation_is_spearmans(values: list[int], random: st.DataObject) -> None:
    other = list(values)
    random.shuffle(other)  # type: ignore[attr-defined]
    found = float(rank_correlation(torch.tensor(values).double(), torch.tensor(other).double()))
    assert found == pytest.approx(spearmanr(values, other).statistic, abs=1e-9)


def test_similarity_is_found_by_vectors_that_say_the_same() -> None:
    pairs = torch.combinations(torch.arange(5))
    unit = torch.nn.functional.normalize(VECTORS, dim=-1)
    alike = (unit @ unit.T)[pairs[:, 0], pairs[:, 1]] + torch.linspace(0, 1e-3, len(pairs))
    assert float(similarity_found(VECTORS + 1e-6 * torch.arange(15).reshape(5, 3), pairs, alike)) > 0.85
    assert float(similarity_found(VECTORS, pairs, -alike)) < -0.85


def test_principal_components_are_the_widest_and_settled_in_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 4, generator=generator) * torch.tensor([1, 9.0, 0.1, 3])
    found = principal(points)
    assert found.shape == (50, 2)
    centred = points - points.mean(0)
    assert torch.corrcoef(torch.stack([found[:, 0], centred[:, 1]]))[0, 1] > 0.98
    assert torch.corrcoef(torch.stack([found[:, 1], centred[:, 3]]))[0, 1].abs() > 0.98


def test_sums_are_read() -> None:
    assert terms("Hotter - hot + big") == {"hotter": 1, "hot": -1, "big": 1}
    assert terms("king\u2212man+woman") == {"king": 1, "man": -1, "woman": 1}
    assert terms("hot + hot") == {"hot": 2}
    for line in ("", " + - "):
        with pytest.raises(DataError, match="neither a word nor a sum"):
            terms(line)


def test_words_are_asked_in_words_and_drawn() -> None:
    found = WordVectors(WordVocabulary(WORDS, (5, 4, 3, 2, 1)), VECTORS)
    assert found.near("hotter - hot + big", 1)[0][0] == "bigger"
    assert [word for word, _ in found.near("hot", 9)] == ["hotter", "big", "bigger", "rome"]
    with pytest.raises(DataError, match="'huge' is not among the 5 known"):
        found.near("hot + huge", 1)
    picture = found.drawn([["hot", "hotter"], ["big", "bigger", "hot"]])
    assert picture.shape[0] == 3
    assert picture.min() >= 0
    assert picture.max() == 1
    colours = {tuple(p) for p in (picture.permute(1, 2, 0).reshape(-1, 3) * 255).round().int().tolist()}
    assert len(colours) > 3, "ink in two colours on white"
    assert not found.drawn([["hot", "rome"]]).equal(found.drawn([["hot", "big"]]))
    assert found.drawn([["hot"]]).shape == picture.shape, "a single word has a picture, too"
