"""A generated text with relations planted in it, of which it is known what word vectors should find.

Every planted word is a form of something: "hotter" is the comparative of "hot", "paris" the capital of "france". What
it is of decides half of the company that it keeps, and the form the other half: all forms of "hot" have some words
around them, and all comparatives have others. No sentence says that two words belong together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millrace.data.randomness import derived_seed

# One kind of words a line: rows of the same forms.
_ENDINGS = (
    (
        ("", "er", "est"),
        "warm cold dark light hard soft loud quick slow high low deep short young old rich poor clean sharp smooth "
        "bright thick small great sweet strong weak tall long cheap",
    ),
    (("", "s", "ed", "ing"), "walk talk jump paint cook open help call play pull plant count print fill sort pack"),
    (
        ("", "s"),
        "dog cat horse bird tree river road house ship hill lamp door chair table book shirt apple stone coin ring",
    ),
)
_ROWS = (
    "hot hotter hottest|big bigger biggest|good better best|bad worse worst",
    "france paris|italy rome|spain madrid|germany berlin|greece athens|japan tokyo|egypt cairo|norway oslo|"
    "sweden stockholm|austria vienna|poland warsaw|portugal lisbon|cuba havana|peru lima|kenya nairobi",
    "king queen|prince princess|actor actress|uncle aunt|brother sister|father mother|son daughter|husband wife|"
    "boy girl|nephew niece|waiter waitress|duke duchess",
)
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_COMPANY = 400  # words that keep the planted ones company
_OF_A_ROW, _OF_A_FORM = 8, 12  # of these
_AROUND = 10  # words around a planted one in a sentence
_OTHERS = 0.2  # share of them that says nothing
_NEXT_ROWS = 3  # with how many rows each one makes analogies


@dataclass(frozen=True)
class Planted:
    """sentences: the text. analogies: (a, b, c, d), where b is to a as d is to c. rows: the forms of each word."""

    sentences: list[list[str]]
    analogies: list[tuple[str, str, str, str]]
    rows: list[tuple[str, ...]]


def planted(count: int, seed: int) -> Planted:
    """A text of `count` sentences of eleven words."""
    random = np.random.default_rng(derived_seed("planted", seed))
    kinds = _kinds()
    words: list[str] = []
    company = []
    for rows in kinds:
        forms = [random.choice(_COMPANY, _OF_A_FORM, replace=False) for _ in rows[0]]
        for row in rows:
            own = random.choice(_COMPANY, _OF_A_ROW, replace=False)
            words += row
            company += [(own, form) for form in forms]
    names = _names(random)
    chosen = random.integers(len(words), size=count)
    around = _around(random, np.array([own for own, _ in company]), np.array([form for _, form in company]), chosen)
    half = _AROUND // 2
    sentences = [
        [*(names[n] for n in numbers[:half]), words[word], *(names[n] for n in numbers[half:])]
        for word, numbers in zip(chosen.tolist(), around.tolist(), strict=True)
    ]
    return Planted(sentences, [a for rows in kinds for a in _analogies(rows)], [row for rows in kinds for row in rows])


def _kinds() -> list[list[tuple[str, ...]]]:
    """All rows of each kind: [[("warm", "warmer", "warmest"), …], …]."""
    regular = [[tuple(stem + ending for ending in endings) for stem in stems.split()] for endings, stems in _ENDINGS]
    others = [[tuple(row.split()) for row in rows.split("|")] for rows in _ROWS]
    return [regular[0] + others[0], *regular[1:], *others[1:]]


def _names(random: np.random.Generator) -> list[str]:
    """Words that mean nothing, of three syllables."""
    found: dict[str, None] = {}
    while len(found) < _COMPANY:
        found["".join(random.choice(_SYLLABLES, 3))] = None
    return list(found)


def _around(
    random: np.random.Generator, own: npt.NDArray[np.int64], form: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The company [sentences, 10] of chosen words, from that of the rows [words, 8] and of the forms [words, 12]."""
    shape = len(chosen), _AROUND
    of_row = own[chosen[:, None], random.integers(own.shape[1], size=shape)]
    of_form = form[chosen[:, None], random.integers(form.shape[1], size=shape)]
    other = random.integers(_COMPANY, size=shape)
    kind = random.random(shape)
    return np.where(kind < _OTHERS, other, np.where(kind < (1 + _OTHERS) / 2, of_row, of_form))


def _analogies(rows: list[tuple[str, ...]]) -> list[tuple[str, str, str, str]]:
    forms = len(rows[0])
    return [
        (row[i], row[j], other[i], other[j])
        for place, row in enumerate(rows)
        for other in (rows[(place + step) % len(rows)] for step in range(1, _NEXT_ROWS + 1))
        for i in range(forms)
        for j in range(forms)
        if i != j
    ]
