"""Simulated annealing over placements and orders, from several starts.

Source: Kirkpatrick, Gelatt, Vecchi 1983, in rounds that cool down from ever better starts. What a trial may take is
drawn before it is walked, so that the walk can end as soon as it takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from millrace.errors import PlacementError
from millrace.place.algorithms.expert import expert
from millrace.place.algorithms.finish import checked
from millrace.place.algorithms.heft import heft
from millrace.place.algorithms.hints_only import hints_only
from millrace.place.algorithms.moves import Moves
from millrace.place.algorithms.pipeline import pipeline
from millrace.place.devices import pinned_devices
from millrace.place.evaluate import Evaluator, Score
from millrace.place.order import best_scored, pipelined_rank, ranked_order
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.tables import tables

_HOT, _COLD = 0.03, 0.0003  # temperatures, as parts of the time of the step
_MOVES_PER_GROUP = 60  # in a round
_REORDERS = 4  # in a round
_ROUNDS = 60
_PATIENCE = 12  # rounds without gain
_NOISE = (0.02, 0.1, 0.3)
_OVER = 10.0  # the price of all memory once more, in steps


@dataclass(frozen=True, eq=False)
class Found:
    """The best placement and order of a search; rounds and trials: what it took."""

    device_G: Ints
    order_T: Ints
    score: Score
    rounds: int
    trials: int


def local_search(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Anneal from what expert, heft, pipeline and hints_only find, or from a random placement where none fits.

    Raises: PlacementError when nothing that fits is found.
    """
    deadline = time.monotonic() + budget_s
    starts = []
    for algorithm in (expert, heft, pipeline, hints_only):
        try:
            starts.append(algorithm(problem, budget_s=budget_s / 8, seed=seed))
        except PlacementError:
            continue
    found = improve(problem, starts, deadline - time.monotonic(), seed)
    note = f"{found.trials} trials in {found.rounds} rounds from {', '.join(s.algorithm for s in starts) or 'nothing'}"
    return checked(problem, Plan(found.device_G, found.order_T, "local_search", note))


def improve(problem: Problem, starts: Sequence[Plan], budget_s: float, seed: int) -> Found:
    """Anneal from each start once, then from the best again and again, until the time is over or nothing is gained.

    Without starts it begins with a random placement. The result is never worse than the best start.
    """
    deadline = time.monotonic() + budget_s
    random = np.random.default_rng(seed)
    pinned_devices(problem)
    search = _Search(problem, random, deadline)
    begun = [(plan.device_G, plan.order_T) for plan in starts] or [_random_start(problem, random)]
    for device_G, order_T in begun:
        search.consider(device_G, order_T)
        search.consider(device_G, best_scored(problem, device_G)[0])
    idle = rounds = 0
    while search.moves.movable and rounds < _ROUNDS and idle < _PATIENCE and time.monotonic() < deadline:
        kept = search.best
        if rounds < len(begun) and rounds:
            search.round(*begun[rounds], _HOT)
        else:
            search.round(kept.device_G, kept.order_T, (0.03, 0.1, 0.3, 0.01)[idle % 4])
        rounds += 1
        idle = 0 if _better(search.best.score, kept.score, 1e-4) else idle + 1
    best = search.best
    return Found(best.device_G, best.order_T, best.score, rounds, search.trials)


class _Search:
    """The best so far, and one round of annealing."""

    def __init__(self, problem: Problem, random: np.random.Generator, deadline: float) -> None:
        self.problem, self.random, self.deadline = problem, random, deadline
        self.moves = Moves(problem)
        self.evaluator = Evaluator(problem)
        self.best: Found = Found(np.zeros(0, int), np.zeros(0, int), Score(np.inf, np.inf), 0, 0)
        self.trials = 0

    def consider(self, device_G: Ints, order_T: Ints) -> Score:
        """Make a placement and an order the base of trials, and keep them if they are the best."""
        score = self.evaluator.reset(device_G, order_T)
        self._keep(score)
        return score

    def round(self, device_G: Ints, order_T: Ints, hot: float) -> None:
        """Anneal from hot to cold, looking for a better order now and then."""
        now = self.consider(device_G, order_T)
        count = max(400, _MOVES_PER_GROUP * len(self.moves.movable))
        cooling = (_COLD / hot) ** (1 / count)
        temperature_s = hot * (self.best.score.step_s if np.isfinite(self.best.score.step_s) else 1.0)
        for number in range(count):
            temperature_s *= cooling
            if number % 64 == 0 and time.monotonic() > self.deadline:
                break
            if number % (count // _REORDERS) == count // _REORDERS - 1:
                now = self._reorder(now)
            changed, moved = self.moves.draw(self.evaluator.device_G, self.random)
            if not moved:
                continue
            self.trials += 1
            limit_s = self._cost(now) - temperature_s * float(np.log(self.random.random() + 1e-300))
            score = self.evaluator.trial(changed, moved, limit_s)
            if self._cost(score) <= limit_s:
                now = self.evaluator.accept(changed, moved)
                self._keep(now)
        self._reorder(now)
        self.consider(self.best.device_G, self.best.order_T)
        self._reorder(self.best.score)

    def _reorder(self, now: Score) -> Score:
        """Look for a better order of the base."""
        device_G, kept_T = self.evaluator.device_G.copy(), self.evaluator.order_T
        candidates = [best_scored(self.problem, device_G)[0]]
        rank_T = pipelined_rank(self.problem, device_G)
        for noise in _NOISE:
            factor_T = 1 + noise * self.random.standard_normal(len(rank_T))
            candidates.append(ranked_order(self.problem, device_G, rank_T * factor_T))
        for order_T in candidates:
            score = self.consider(device_G, order_T)
            if _better(score, now):
                now, kept_T = score, order_T
        return self.consider(device_G, kept_T)

    def _cost(self, score: Score) -> float:
        return score.step_s * (1 + _OVER * score.over_bytes / float(self.problem.memory_bytes_D.sum()))

    def _keep(self, score: Score) -> None:
        if _better(score, self.best.score):
            self.best = Found(self.evaluator.device_G.copy(), self.evaluator.order_T.copy(), score, 0, 0)


def _better(score: Score, other: Score, by: float = 0.0) -> bool:
    if score.over_bytes != other.over_bytes:
        return score.over_bytes < other.over_bytes
    return score.step_s < other.step_s * (1 - by)


def _random_start(problem: Problem, random: np.random.Generator) -> tuple[Ints, Ints]:
    device_G = np.array([random.choice(np.flatnonzero(row)) for row in tables(problem).allowed_GD], dtype=np.int64)
    return device_G, best_scored(problem, device_G)[0]
