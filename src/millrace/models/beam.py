"""Beam search: the likeliest sequences that a model, asked for one token at a time, would write.

Shape suffixes: B sources, W hypotheses for each (the width of the beam), N = B·W rows, T tokens so far, S places of a
source, V tokens in the vocabulary.

Source: Wu et al., "Google's neural machine translation system", 2016, §7 (length normalization, coverage penalty).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from millrace.errors import SettingError

State: TypeAlias = Mapping[str, Tensor]  # the first axis of every tensor numbers the rows
Allowed: TypeAlias = Callable[[tuple[int, ...]], Iterable[int]]  # the tokens so far -> those that may come next
_UNSEEN = 1e-9  # attention to a place that no token looked at, whose logarithm would be infinite


@dataclass(frozen=True)
class Step:
    """What a model says about one token more of every row."""

    log_probs: Tensor  # [N, V], natural logarithms
    state: State = field(default_factory=dict)  # only what has changed; the rest of the state stays
    attention: Tensor | None = None  # [N, S], how much of the source it looked at; needed for coverage and pictures


@dataclass(frozen=True)
class Hypothesis:
    """One sequence that was found."""

    tokens: tuple[int, ...]  # without the start and the end
    log_prob: float  # of the tokens and the end
    score: float  # log_prob, normalized by length, with the penalty for coverage
    attention: Tensor | None  # [len(tokens) + 1, S]; the last row is the end's


@dataclass(frozen=True)
class Beam:
    """How to search.

    Raises: SettingError: the width or the length is no positive number, or a penalty is negative.
    """

    start: int  # the token before the first
    end: int  # the token after the last
    width: int = 4  # hypotheses that are kept at every step
    max_length: int = 50  # tokens, without the end
    length_penalty: float = 0.6  # alpha: 0 compares plain probabilities, which favours the short
    coverage_penalty: float = 0.0  # beta: what it costs to leave places of the source without attention

    def __post_init__(self) -> None:
        if self.width < 1 or self.max_length < 1 or self.length_penalty < 0 or self.coverage_penalty < 0:
            raise SettingError(
                f"A beam needs width >= 1, max_length >= 1 and penalties >= 0, but got width={self.width}, "
                f"max_length={self.max_length}, length_penalty={self.length_penalty}, "
                f"coverage_penalty={self.coverage_penalty}."
            )

    def normalizer(self, length: int) -> float:
        """What the logarithm of a probability is divided by for so many tokens, the end included (equation 14)."""
        return ((5 + length) / 6) ** self.length_penalty


@dataclass(frozen=True)
class _Live:
    """The hypotheses that have not ended."""

    tokens_NT: Tensor
    log_probs_BW: Tensor  # -inf where there is none
    state: State
    attention_NTS: Tensor | None

    def prefix(self, row: int) -> tuple[int, ...]:
        return tuple(self.tokens_NT[row, 1:].tolist())  # without the start


@torch.no_grad()
def beam_search(
    step: Callable[[Tensor, State], Step],
    state: State,
    beam: Beam,
    *,
    sources: int,
    source_mask: Tensor | None = None,
    allowed: Allowed | None = None,
) -> list[list[Hypothesis]]:
    """The best sequences for each of several sources, best first.

    Of all sequences of at most `max_length` tokens, those with the best score, as far as the beam sees them: with as
    many hypotheses as there are sequences it is an exhaustive search. Stops as soon as nothing better can come.

    Args:
        step: (last tokens [N] int64, state of N rows) to what comes next.
        state: of the sources, [B, …] each, on the device of the model; its rows are repeated for the hypotheses.
        beam: how to search.
        sources: B.
        source_mask: [B, S] bool, where a source is not padding, for the coverage; all of it unless given.
        allowed: which tokens may come after a prefix (the end among them where it may end), such as those of a trie;
            all unless given. Probabilities stay as they are.

    Returns: for each source at most `width` hypotheses, best first; none where nothing that is allowed has any
        probability.
    """
    device = next((part.device for part in state.values()), torch.device("cpu"))
    rows = {name: part.repeat_interleave(beam.width, 0) for name, part in state.items()}
    log_probs_BW = torch.full((sources, beam.width), -math.inf, device=device)
    log_probs_BW[:, 0] = 0.0  # one empty hypothesis, and no copies of it
    start_N1 = torch.full((sources * beam.width, 1), beam.start, dtype=torch.int64, device=device)
    live = _Live(start_N1, log_probs_BW, rows, None)
    found: list[list[Hypothesis]] = [[] for _ in range(sources)]
    for length in range(beam.max_length + 1):
        said = step(live.tokens_NT[:, -1], live.state)
        live = replace(live, attention_NTS=_longer(live.attention_NTS, said))
        next_BWV = live.log_probs_BW[..., None] + said.log_probs.view(sources, beam.width, -1)
        if allowed is not None:
            next_BWV = next_BWV + _forbidden(live, allowed, next_BWV)
        _collect(found, live, next_BWV[..., beam.end], beam, source_mask)
        if length == beam.max_length:
            break
        next_BWV[..., beam.end] = -math.inf
        live = _continued(live, next_BWV, said.state)
        best_B = live.log_probs_BW.amax(1).double() / beam.normalizer(beam.max_length + 1)
        if all(_settled(best, hypotheses, beam) for best, hypotheses in zip(best_B.tolist(), found, strict=True)):
            break
    return found


def _longer(attention_NTS: Tensor | None, said: Step) -> Tensor | None:
    if said.attention is None:
        return None
    latest_N1S = said.attention[:, None]
    return latest_N1S if attention_NTS is None else torch.cat([attention_NTS, latest_N1S], 1)


def _forbidden(live: _Live, allowed: Allowed, like_BWV: Tensor) -> Tensor:
    """0 where a token is allowed and -inf elsewhere, [B, W, V]."""
    mask_BWV = torch.full_like(like_BWV, -math.inf)
    rows = mask_BWV.view(-1, mask_BWV.shape[-1])
    for row in live.log_probs_BW.flatten().isfinite().nonzero()[:, 0].tolist():
        rows[row, list(allowed(live.prefix(row)))] = 0.0
    return mask_BWV


def _collect(
    found: list[list[Hypothesis]], live: _Live, ended_BW: Tensor, beam: Beam, source_mask: Tensor | None
) -> None:
    """Add the hypotheses that end here to those that were found before, as many as the beam is wide."""
    tokens = live.tokens_NT.shape[1]  # the start is one of them, for the end that is to come
    score_BW = ended_BW.double() / beam.normalizer(tokens)
    if beam.coverage_penalty and live.attention_NTS is not None:
        score_BW = score_BW + beam.coverage_penalty * _coverage(live.attention_NTS, source_mask, beam.width)
    scores, log_probs = score_BW.tolist(), ended_BW.tolist()
    for source, hypotheses in enumerate(found):
        for place in range(beam.width):
            score = scores[source][place]
            if score == -math.inf or (len(hypotheses) >= beam.width and score <= hypotheses[-1].score):
                continue
            row = source * beam.width + place
            attention = None if live.attention_NTS is None else live.attention_NTS[row].clone()
            hypotheses.append(Hypothesis(live.prefix(row), log_probs[source][place], score, attention))
            hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
            del hypotheses[beam.width :]


def _coverage(attention_NTS: Tensor, source_mask: Tensor | None, width: int) -> Tensor:
    """The sum of log(min(attention a place got in all, 1)) over the source's places (equation 14), [B, W]."""
    missing_NS = attention_NTS.double().sum(1).clamp(_UNSEEN, 1.0).log()
    if source_mask is not None:
        missing_NS = missing_NS * source_mask.repeat_interleave(width, 0)
    return missing_NS.sum(-1).view(-1, width)


def _continued(live: _Live, next_BWV: Tensor, changed: State) -> _Live:
    """The likeliest continuations of each source's hypotheses. What did not change is the same in all of its rows."""
    sources, width, vocabulary = next_BWV.shape
    log_probs_BW, chosen_BW = next_BWV.flatten(1).topk(width, dim=1)
    first_row_B1 = torch.arange(sources, device=next_BWV.device)[:, None] * width
    rows_N = (first_row_B1 + chosen_BW // vocabulary).flatten()
    tokens_NT = torch.cat([live.tokens_NT[rows_N], (chosen_BW % vocabulary).view(-1, 1)], 1)
    state = {**live.state, **{name: part[rows_N] for name, part in changed.items()}}
    attention = None if live.attention_NTS is None else live.attention_NTS[rows_N]
    return _Live(tokens_NT, log_probs_BW, state, attention)


def _settled(best: float, hypotheses: list[Hypothesis], beam: Beam) -> bool:
    """Whether no continuation can be better than what was found; `best` is the score of one that costs nothing more."""
    return best == -math.inf or (len(hypotheses) == beam.width and best <= hypotheses[-1].score)
