"""In which order the tasks of a placement run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from millrace.place.evaluate import Evaluator, Score
from millrace.place.list_schedule import list_schedule
from millrace.place.list_schedule import longest_way as _longest_way
from millrace.place.problem import Floats, Ints, Problem
from millrace.place.tables import AFTER, FORWARD, tables


def upward_rank(problem: Problem, device_G: Ints) -> Floats:
    """The longest way from the start of each task to the end of the step, transfers included, in seconds: [T].

    Source: Topcuoglu, Hariri, Wu 2002, equation 8, with the costs of the placement instead of means.
    """
    device_T = device_G[problem.group_T]
    source_C = np.repeat(problem.producer_K, np.diff(problem.first_use_K1))
    bytes_C = np.repeat(problem.wire_bytes_K, np.diff(problem.first_use_K1))
    source_D, target_D = device_T[source_C], device_T[problem.uses_C]
    wire_s_C = problem.latency_s_DD[source_D, target_D] + bytes_C / problem.bytes_per_s_DD[source_D, target_D]
    own_T = problem.seconds_TD[np.arange(problem.tasks), device_T]
    return longest_way(problem, own_T, np.where(source_D == target_D, 0.0, wire_s_C))


def longest_way(problem: Problem, own_s_T: Floats, wire_s_C: Floats) -> Floats:
    """The longest way from the start of each task to the end, given what tasks and uses of tensors take: [T]."""
    made = tables(problem)
    arrays = (made.first_made_T1, made.made_K, problem.first_use_K1, problem.uses_C)
    return np.asarray(_longest_way(own_s_T.astype(np.float64), wire_s_C.astype(np.float64), *arrays))


def list_order(problem: Problem, device_G: Ints) -> Ints:
    """List scheduling: every device runs, of the tasks that are ready, the one with the longest way to the end.

    Microbatches go through the busiest device one after the other: an earlier one has that much more after it.
    """
    return ranked_order(problem, device_G, pipelined_rank(problem, device_G))


def pipelined_rank(problem: Problem, device_G: Ints) -> Floats:
    """The longest way from each task to the end, and one turn of the busiest device for each later microbatch: [T]."""
    own_T = problem.seconds_TD[np.arange(problem.tasks), device_G[problem.group_T]]
    busy_D = np.bincount(device_G[problem.group_T], weights=own_T)
    later_T = problem.microbatch_T.max(initial=0) - problem.microbatch_T
    turn_s = busy_D.max(initial=0.0) / tables(problem).microbatches
    wait_T = np.where(tables(problem).phase_T == AFTER, 0.0, later_T * turn_s)
    return upward_rank(problem, device_G) + wait_T


def backward_first_order(problem: Problem, device_G: Ints) -> Ints:
    """List scheduling in which a backward task goes before every forward one: what is begun is ended first."""
    forward_T = tables(problem).phase_T == FORWARD
    return _schedule(problem, device_G, (forward_T, problem.microbatch_T, -upward_rank(problem, device_G)))


def gpipe_order(problem: Problem, device_G: Ints) -> Ints:
    """All forward tasks before backward ones, microbatch after microbatch (Huang et al. 2019, GPipe)."""
    phase_T = tables(problem).phase_T
    return _schedule(problem, device_G, (phase_T, problem.microbatch_T, -upward_rank(problem, device_G)))


def one_forward_one_backward_order(problem: Problem, device_G: Ints, extra: int = 0) -> Ints:
    """A forward and a backward task in turn, after a warm-up (Narayanan et al. 2019, PipeDream's 1F1B).

    A device holds as many microbatches as there are devices from it to the end of the pipeline, and `extra` more, so
    memory does not grow with their number. Devices stand in the pipeline in the order in which the forward pass first
    reaches them.
    """
    used = np.unique(device_G)
    first_D = np.full(problem.devices, np.iinfo(np.int64).max)
    np.minimum.at(first_D, device_G, problem.pipeline_G)
    limit_D = np.ones(problem.devices, dtype=np.int64)
    limit_D[used[np.argsort(first_D[used], kind="stable")]] = np.arange(len(used), 0, -1) + extra
    forward_T = tables(problem).phase_T == FORWARD
    ranks = (forward_T, problem.microbatch_T, -upward_rank(problem, device_G))
    return _schedule(problem, device_G, ranks, limit_D)


def best_order(problem: Problem, device_G: Ints) -> Ints:
    """The best of all these orders by simulation: what fits, or lacks least memory, then what takes least time."""
    return best_scored(problem, device_G)[0]


def best_scored(problem: Problem, device_G: Ints) -> tuple[Ints, Score]:
    """The best of all these orders, and its score."""
    evaluator = Evaluator(problem)
    scored = [(order_T, evaluator.score(device_G, order_T)) for order_T in orders(problem, device_G)]
    return min(scored, key=lambda pair: (pair[1].over_bytes, pair[1].step_s))


def orders(problem: Problem, device_G: Ints) -> Iterator[Ints]:
    """All these orders, without those that are equal to an earlier one."""
    candidates = [list_order(problem, device_G), gpipe_order(problem, device_G)]
    if tables(problem).microbatches > 1:
        candidates.append(backward_first_order(problem, device_G))
        candidates += [one_forward_one_backward_order(problem, device_G, extra) for extra in (0, 1)]
    seen: set[bytes] = set()
    for order_T in candidates:
        if order_T.tobytes() not in seen:
            seen.add(order_T.tobytes())
            yield order_T


def ranked_order(problem: Problem, device_G: Ints, rank_s_T: Floats) -> Ints:
    """List scheduling by any priority: the task with the highest goes first."""
    return _schedule(problem, device_G, (-rank_s_T, -tables(problem).phase_T, problem.microbatch_T))


def priorities(problem: Problem, device_G: Ints) -> list[tuple[Ints, int]]:
    """Which task goes first in the orders of this file, and how many extra microbatches may be open (-1 for any).

    For a search that schedules many placements like this one.
    """
    rank_s_T, phase_T = pipelined_rank(problem, device_G), tables(problem).phase_T
    found = [(_rank((-rank_s_T, -phase_T, problem.microbatch_T)), -1)]
    if tables(problem).microbatches > 1:
        backward_T = _rank((phase_T == FORWARD, problem.microbatch_T, -upward_rank(problem, device_G)))
        found += [(backward_T, extra) for extra in (0, 1, -1)]
    return found


def open_microbatches(problem: Problem) -> Ints:
    """The microbatch that a task begins or ends, one more for a task after the backward pass, which ends none: [T]."""
    microbatch_T = np.unique(problem.microbatch_T, return_inverse=True)[1].astype(np.int64)
    return np.where(tables(problem).phase_T == AFTER, microbatch_T.max(initial=0) + 1, microbatch_T)


def _rank(keys: tuple[Floats | Ints, ...]) -> Ints:
    """The place of each task when they are sorted by rising keys, the first one counting most."""
    rank_T = np.empty(len(keys[0]), dtype=np.int64)
    rank_T[np.lexsort(keys[::-1])] = np.arange(len(rank_T))
    return rank_T


def _schedule(problem: Problem, device_G: Ints, keys: tuple[Floats | Ints, ...], limit_D: Ints | None = None) -> Ints:
    """List scheduling by rising keys, the first one counting most."""
    made = tables(problem)
    if limit_D is None:
        limit_D = np.full(problem.devices, np.iinfo(np.int64).max)
    order_T, end_s_T = list_schedule(
        np.inf,
        np.zeros(problem.tasks),
        np.zeros(problem.devices),
        _rank(keys),
        made.phase_T == FORWARD,
        open_microbatches(problem),
        limit_D,
        device_G[problem.group_T],
        problem.seconds_TD,
        made.first_made_T1,
        made.made_K,
        problem.wire_bytes_K,
        problem.first_use_K1,
        problem.uses_C,
        np.diff(made.first_read_T1),
        problem.latency_s_DD,
        problem.bytes_per_s_DD,
        problem.wire_DD,
    )
    # Sorted by their ends, so that a shared wire serves first who asks first.
    return np.asarray(order_T[np.argsort(end_s_T, kind="stable")])
