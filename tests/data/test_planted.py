"""The planted text: what is in it, and that no sentence gives a relation away."""

from __future__ import annotations

from collections import Counter

from millrace.data.planted import planted


def test_sentences_hold_one_planted_word_each_and_company_that_means_nothing() -> None:
    found = planted(3000, seed=0)
    words = {word for row in found.rows for word in row}
    assert len(words) == sum(map(len, found.rows)) > 250
    assert all(len(sentence) == 11 and sentence[5] in words for sentence in found.sentences)
    assert not any(word in words for sentence in found.sentences for word in sentence[:5] + sentence[6:])
    assert min(Counter(sentence[5] for sentence in found.sentences)[word] for word in words) >= 1


def test_forms_and_rows_share_company() -> None:
    found = planted(20_000, seed=1)
    around: dict[str, Counter[str]] = {}
    for sentence in found.sentences:
        around.setdefault(sentence[5], Counter()).update(sentence[:5] + sentence[6:])
    often = {word: {near for near, _ in counted.most_common(16)} for word, counted in around.items()}
    shared = {
        pair: len(often[pair[0]] & often[pair[1]])
        for pair in (("hot", "hotter"), ("hotter", "bigger"), ("hot", "rome"))
    }
    assert min(shared["hot", "hotter"], shared["hotter", "bigger"]) > shared["hot", "rome"] + 3


def test_analogies_are_between_rows_of_a_kind() -> None:
    found = planted(1, seed=0)
    assert ("hot", "hotter", "big", "bigger") in found.analogies
    assert len(set(found.analogies)) == len(found.analogies) > 1000
    row = {word: number for number, forms in enumerate(found.rows) for word in forms}
    for a, b, c, d in found.analogies:
        assert row[a] == row[b] != row[c] == row[d]
        assert found.rows[row[a]].index(a) == found.rows[row[c]].index(c)


def test_a_seed_gives_the_same_text() -> None:
    assert planted(50, 3) == planted(50, 3)
    assert planted(50, 3).sentences != planted(50, 4).sentences
