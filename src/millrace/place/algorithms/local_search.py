"""Simulated annealing over placements and orders, from several starts.

Source: Kirkpatrick, Gelatt, Vecchi 1983, in rounds that cool down, each from the best so far.
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
from millrace.place.algorithms.interleaved import interleaved
from millrace.place.algorithms.pipeline import pipeline
from millrace.place.anneal import anneal
from millrace.place.anneal_placements import anneal_placements
from millrace.place.devices import pinned_devices, pipeline_order
from millrace.place.evaluate import Evaluator, Score, least_seconds_after
from millrace.place.order import best_scored, open_microbatches, pipelined_rank, priorities, ranked_order
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.tables import FORWARD, tables

_HOT = (0.003, 0.03, 0.1, 0.3)  # temperatures at the beginning of rounds, as parts of the time of the step
_COLD = 0.0003
_TRIALS_PER_GROUP = 1000  # in a round, of at least so many trials, and at most so many tasks walked
_LEAST_TRIALS, _MOST_TASKS = 20_000, 3_000_000
_PLACEMENTS = 1000  # trials that schedule all tasks anew, in a round
_WARM = (0.03, 0.01, 0.003, 0.1)  # their temperatures at the beginning of rounds
_CHUNK = 300  # trials between looks at the clock, for a problem of a thousand tasks
_ROUNDS = 800
_NEAR = 1.3  # a start is good when it takes at most so many times what the best takes
_TURN = 8  # rounds of which the last changes the order, too
_CLOSE = 1.01  # other orders are tried for what takes at most so many times what the best takes
_PATIENCE = 80  # rounds without gain
_ORDER_SHARE = 0.3
_NOISE = (0.02, 0.1, 0.3)
_OVER = 1000.0  # the price of all memory once more, in steps


@dataclass(frozen=True, eq=False)
class Found:
    """The best placement and order of a search; rounds and trials: what it took."""

    device_G: Ints
    order_T: Ints
    score: Score
    rounds: int = 0
    trials: int = 0


def local_search(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Anneal from what the quick algorithms find, or from a random placement where nothing fits.

    Raises: PlacementError when nothing that fits is found.
    """
    begun = time.monotonic()
    starts = []
    for algorithm in (expert, heft, pipeline, interleaved, hints_only):
        try:
            starts.append(algorithm(problem, budget_s=budget_s / 8, seed=seed))
        except PlacementError:
            continue
    found = improve(problem, starts, max(budget_s - (time.monotonic() - begun), budget_s / 2), seed)
    note = f"{found.trials} trials in {found.rounds} rounds from {', '.join(s.algorithm for s in starts) or 'nothing'}"
    return checked(problem, Plan(found.device_G, found.order_T, "local_search", note))


def improve(problem: Problem, starts: Sequence[Plan], budget_s: float, seed: int) -> Found:
    """Anneal from each good start once, then from the best again and again, until time is over or nothing is gained.

    Without starts it begins with a random placement. The result is never worse than the best start.
    """
    random = np.random.default_rng(seed)
    pinned_devices(problem)
    search = _Search(problem, random)
    begun = [_reordered(problem, plan) for plan in starts] or [_random_start(problem, random)]
    search.anneal(begun[0], 1, 1.0, np.inf)  # compiled before the clock starts
    search.replace(begun[0], 1, 1.0, 0, np.inf)
    deadline = time.monotonic() + budget_s
    for found in begun:
        search.keep(found)
    begun = [found for found in begun if found.score.step_s <= _NEAR * search.best.score.step_s]
    idle = rounds = 0
    while search.movable and rounds < _ROUNDS and idle < _PATIENCE and time.monotonic() < deadline:
        kept = search.best
        if rounds % _TURN < _TURN - 1:
            start = begun[rounds] if rounds < len(begun) else kept
            ended = search.replace(start, _PLACEMENTS, _WARM[rounds % len(_WARM)], rounds, deadline)
        else:
            ended = search.anneal(kept, search.trials_a_round, _HOT[idle // _TURN % len(_HOT)], deadline)
        if ended.score.step_s <= _CLOSE * search.best.score.step_s:
            search.reorder(ended)
        rounds += 1
        idle = 0 if _better(search.best.score, kept.score, 1e-4) else idle + 1
    best = search.best
    return Found(best.device_G, best.order_T, best.score, rounds, search.trials)


class _Search:
    """The best so far, and what every round of annealing needs."""

    def __init__(self, problem: Problem, random: np.random.Generator) -> None:
        self.problem, self.random = problem, random
        self.evaluator = Evaluator(problem)
        self.movable = np.flatnonzero(tables(problem).allowed_GD.sum(axis=1) > 1).tolist()
        self.best = Found(np.zeros(0, int), np.zeros(0, int), Score(np.inf, np.inf))
        self.trials = 0
        least = max(_LEAST_TRIALS, _TRIALS_PER_GROUP * len(self.movable))
        self.trials_a_round = min(least, max(_MOST_TASKS // problem.tasks, 1))
        self._arrays = problem_arrays(problem, self.movable)

    def keep(self, found: Found) -> None:
        """Remember the best."""
        if _better(found.score, self.best.score):
            self.best = found

    def anneal(self, start: Found, trials: int, hot: float, deadline: float) -> Found:
        """Change a plan from hot to cold. Returns: the best on the way."""
        order_share = _ORDER_SHARE if self.movable else 1.0
        price = _OVER / float(self.problem.memory_bytes_D.sum())
        unit_s = start.score.step_s if np.isfinite(start.score.step_s) else 1.0
        device_G, order_T, best = start.device_G.copy(), start.order_T.copy(), start
        chunk = max(20, int(_CHUNK * 1000 / self.problem.tasks))
        cold = (_COLD / hot) ** (1 / trials)
        for first in range(0, trials, chunk):
            count = min(chunk, trials - first)
            best_G, best_T = device_G.copy(), order_T.copy()
            step_s, over = anneal(
                self.random.random((count, 5)),
                unit_s * hot * cold**first,
                unit_s * hot * cold ** (first + count),
                price,
                order_share,
                device_G,
                order_T,
                best_G,
                best_T,
                *self._arrays,
            )
            self.trials += count
            if _better(Score(step_s, over), best.score):
                best = Found(best_G, best_T, Score(step_s, over))
            if time.monotonic() > deadline:
                break
        self.keep(best)
        return best

    def replace(self, start: Found, trials: int, hot: float, way: int, deadline: float) -> Found:
        """Change a placement from hot to cold, all tasks scheduled anew each time, in the `way`-th of the orders."""
        price = _OVER / float(self.problem.memory_bytes_D.sum())
        unit_s = start.score.step_s if np.isfinite(start.score.step_s) else 1.0
        ways = priorities(self.problem, start.device_G)
        rank_T, extra = ways[way % len(ways)]
        forward_T, open_T = tables(self.problem).phase_T == FORWARD, open_microbatches(self.problem)
        device_G, best = start.device_G.copy(), start
        chunk = max(10, int(_CHUNK * 300 / self.problem.tasks))
        cold = (_COLD / hot) ** (1 / trials)
        for first in range(0, trials, chunk):
            count = min(chunk, trials - first)
            best_G, best_T = device_G.copy(), start.order_T.copy()
            step_s, over = anneal_placements(
                self.random.random((count, 5)),
                unit_s * hot * cold**first,
                unit_s * hot * cold ** (first + count),
                price,
                extra,
                rank_T,
                forward_T,
                open_T,
                device_G,
                best_G,
                best_T,
                *self._arrays,
            )
            self.trials += count
            if _better(Score(step_s, over), best.score):
                best = Found(best_G, best_T, Score(step_s, over))
            if time.monotonic() > deadline:
                break
        self.keep(best)
        return best

    def reorder(self, found: Found) -> None:
        """Look for a better order of a placement."""
        candidates = [best_scored(self.problem, found.device_G)[0]]
        rank_T = pipelined_rank(self.problem, found.device_G)
        for noise in _NOISE:
            factor_T = 1 + noise * self.random.standard_normal(len(rank_T))
            candidates.append(ranked_order(self.problem, found.device_G, rank_T * factor_T))
        for order_T in candidates:
            self.keep(Found(found.device_G, order_T, self.evaluator.score(found.device_G, order_T)))


def _better(score: Score, other: Score, by: float = 0.0) -> bool:
    if score.over_bytes != other.over_bytes:
        return score.over_bytes < other.over_bytes
    return score.step_s < other.step_s * (1 - by)


def _reordered(problem: Problem, plan: Plan) -> Found:
    order_T, score = best_scored(problem, plan.device_G)
    own = Evaluator(problem).score(plan.device_G, plan.order_T)
    return Found(plan.device_G, order_T, score) if _better(score, own) else Found(plan.device_G, plan.order_T, own)


def _random_start(problem: Problem, random: np.random.Generator) -> Found:
    device_G = np.array([random.choice(np.flatnonzero(row)) for row in tables(problem).allowed_GD], dtype=np.int64)
    return Found(device_G, *best_scored(problem, device_G))


def problem_arrays(problem: Problem, movable: list[int]) -> tuple[object, ...]:
    """What `anneal` takes after the plans."""
    made = tables(problem)
    row_G = pipeline_order(problem)
    source_G = problem.group_T[np.repeat(problem.producer_K, np.diff(problem.first_use_K1))]
    pairs = np.stack([source_G, problem.group_T[problem.uses_C]], axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    near = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0).reshape(-1, 2)
    group_H, allowed_H = np.nonzero(made.allowed_GD)
    return (
        np.array(movable or [0], dtype=np.int64),
        np.searchsorted(group_H, np.arange(problem.groups + 1)).astype(np.int64),
        allowed_H.astype(np.int64),
        made.allowed_GD,
        np.searchsorted(near[:, 0], np.arange(problem.groups + 1)).astype(np.int64),
        np.ascontiguousarray(near[:, 1]),
        row_G,
        np.argsort(row_G),
        made.first_task_G1,
        made.tasks_T,
        made.seconds_GD,
        problem.resident_bytes_G,
        problem.memory_bytes_D,
        problem.group_T,
        problem.scratch_bytes_T,
        made.first_read_T1,
        made.read_X,
        problem.producer_K,
        problem.seconds_TD,
        least_seconds_after(problem),
        made.first_made_T1,
        made.made_K,
        problem.bytes_K,
        problem.wire_bytes_K,
        problem.first_use_K1,
        problem.uses_C,
        problem.latency_s_DD,
        problem.bytes_per_s_DD,
        problem.wire_DD,
    )
