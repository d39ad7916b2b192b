"""Reading what a network trained with CTC says: the likeliest path, or a beam search that knows the words.

Such a network gives, for every frame, probabilities of the symbols and of "blank", symbol 0. A path names one of them
per frame; what it says is the path without repetitions, and then without blanks.

Source: Graves et al., "Connectionist temporal classification", ICML 2006.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLANK = 0


def greedy(log_probabilities: Tensor) -> list[int]:
    """What the likeliest path says.

    Args:
        log_probabilities: [frames, symbols].

    Returns: symbols, none of them blank.
    """
    path = torch.unique_consecutive(log_probabilities.argmax(-1)).tolist()
    return [symbol for symbol in path if symbol != BLANK]


@dataclass
class WordTree:
    """The words that may be said, as a tree of symbols; between two words there is one `space`."""

    words: Iterable[Sequence[int]]  # each at least one symbol, neither blank nor space
    space: int
    root: _Branch = field(init=False)

    def __post_init__(self) -> None:
        self.root = _Branch()
        for word in self.words:
            branch = self.root
            for symbol in word:
                branch = branch.next.setdefault(symbol, _Branch())
            branch.next[self.space] = self.root
            branch.ends_word = True


@dataclass
class _Branch:
    next: dict[int, _Branch] = field(default_factory=dict)
    ends_word: bool = False


@dataclass
class _Prefix:
    """The paths so far that say the same: in sum those that end in a blank, and those that end in its last symbol."""

    branch: _Branch | None
    blank: float = -math.inf
    symbol: float = -math.inf

    @property
    def total(self) -> float:
        return _add(self.blank, self.symbol)


def beam_search(
    log_probabilities: Tensor, width: int = 16, words: WordTree | None = None, least: float = 1e-4
) -> list[int]:
    """What is likeliest to be said, over all paths that say it, of `width` candidates at a time.

    Args:
        log_probabilities: [frames, symbols].
        width: candidates that are kept after each frame.
        words: what is said consists of these; None: of any symbols.
        least: symbols less probable than this in a frame are passed over there.

    Returns: symbols, none of them blank; the greedy ones if no candidate is complete words.

    Source: Hannun et al., "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
    DNNs", 2014, algorithm 1, without a language model.
    """
    kept: dict[tuple[int, ...], _Prefix] = {(): _Prefix(words.root if words else None, blank=0.0)}
    for frame in log_probabilities.tolist():
        likely = [symbol for symbol in range(1, len(frame)) if frame[symbol] > math.log(least)]
        grown: dict[tuple[int, ...], _Prefix] = {}
        for said, prefix in kept.items():
            _extend(said, prefix, frame, likely, grown)
        kept = dict(sorted(grown.items(), key=lambda one: -one[1].total)[:width])
    whole = {s: p.total for s, p in kept.items() if p.branch is None or p.branch.ends_word or not s}
    best = max(whole, key=whole.__getitem__, default=None)
    return greedy(log_probabilities) if best is None else list(best)


def _extend(
    said: tuple[int, ...],
    prefix: _Prefix,
    frame: Sequence[float],
    likely: Sequence[int],
    grown: dict[tuple[int, ...], _Prefix],
) -> None:
    """Add what one frame makes of a prefix: the same again, or one symbol more."""
    same = grown.setdefault(said, _Prefix(prefix.branch))
    same.blank = _add(same.blank, prefix.total + frame[BLANK])
    last = said[-1] if said else None
    if last is not None:
        same.symbol = _add(same.symbol, prefix.symbol + frame[last])
    for symbol in likely:
        branch = prefix.branch
        if branch is not None:
            if symbol not in branch.next:
                continue
            branch = branch.next[symbol]
        longer = grown.setdefault((*said, symbol), _Prefix(branch))
        # The same symbol twice needs a blank between.
        longer.symbol = _add(longer.symbol, (prefix.blank if symbol == last else prefix.total) + frame[symbol])


def edit_distance(is_: Sequence[Hashable], should_be: Sequence[Hashable]) -> int:
    """How many items must be put in, taken out or replaced to make one sequence the other (Levenshtein)."""
    row = list(range(len(should_be) + 1))
    for item in is_:
        above, row = row, [row[0] + 1]
        for place, wanted in enumerate(should_be):
            row.append(min(above[place] + (item != wanted), above[place + 1] + 1, row[place] + 1))
    return row[-1]


def _add(one: float, other: float) -> float:
    """log(exp(one) + exp(other))."""
    low, high = (one, other) if one < other else (other, one)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
