"""The best plan there is, proved by an integer program, for small problems.

The program (`exact_model.py`) is solved by HiGHS, first without any sequencing. Where its answer lets two tasks overlap
on a device, or two transfers on a wire, that pair is forbidden to, and the program is solved again. Each optimum is a
lower bound; when a plan takes no longer in simulation, it is the best.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from millrace.errors import PlacementError
from millrace.place.algorithms.exact_model import ExactModel
from millrace.place.algorithms.expert import expert
from millrace.place.algorithms.finish import checked
from millrace.place.algorithms.heft import heft
from millrace.place.algorithms.hints_only import hints_only
from millrace.place.algorithms.interleaved import interleaved
from millrace.place.algorithms.local_search import Found, improve
from millrace.place.algorithms.pipeline import pipeline
from millrace.place.evaluate import Evaluator
from millrace.place.order import best_scored, ranked_order
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables, transfer_seconds

_GROUPS, _TASKS = 40, 200
_SHARE = 0.25  # of the time, for a good plan to start from
_EQUAL = 1e-5

Conflict = tuple[str, int, int, tuple[int, int]]  # what overlaps where, and for transfers a group that reads each


def exact(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """The fastest plan, and in its note whether that is proved, or how far the lower bound is.

    The bound leaves memory to necessary conditions, so where memory is tight a plan may be the best without proof.

    Raises: PlacementError for more than 40 groups, 200 tasks or several microbatches, and when nothing that fits is
    found.
    """
    microbatches = tables(problem).microbatches
    if problem.groups > _GROUPS or problem.tasks > _TASKS or microbatches > 1:
        raise PlacementError(
            f"exact takes up to {_GROUPS} groups in {_TASKS} tasks and one microbatch; this problem has "
            f"{problem.groups} groups, {problem.tasks} tasks and {microbatches} microbatches. Use 'auto' or "
            "'local_search', or divide the model into fewer groups."
        )
    deadline = time.monotonic() + budget_s
    best = _first(problem, _SHARE * budget_s, seed)
    bound_s, solved = 0.0, 0
    latest_s = best.score.step_s if best.score.over_bytes == 0 else float(_serial_seconds(problem))
    model = ExactModel(problem, latest_s * (1 + 1e-9))
    evaluator = Evaluator(problem)
    forbidden: set[Conflict] = set()
    while time.monotonic() < deadline and not _proved(best, bound_s):
        bound, device_G, start_s_T = model.solve(deadline - time.monotonic())
        bound_s, solved = max(bound_s, min(bound, latest_s)), solved + 1
        if device_G is None or start_s_T is None:
            break
        for order_T in (ranked_order(problem, device_G, -start_s_T), best_scored(problem, device_G)[0]):
            score = evaluator.score(device_G, order_T)
            if (score.over_bytes, score.step_s) < (best.score.over_bytes, best.score.step_s):
                best = Found(device_G, order_T, score)
        conflicts = [c for c in _conflicts(problem, device_G, start_s_T) if c not in forbidden]
        if not conflicts or _proved(best, bound_s):
            break
        forbidden.update(conflicts)
        for kind, one, other, groups in conflicts:
            if kind == "device":
                model.separate(one, other)
            else:
                model.separate_transfers((one, groups[0]), (other, groups[1]))
    gap = max(1 - bound_s / best.score.step_s, 0.0) if best.score.step_s else 0.0
    proof = "proved to be the best" if _proved(best, bound_s) else f"at most {100 * gap:.2g} % above the best"
    note = f"{proof}; no plan takes less than {1e3 * bound_s:.4g} ms, by {solved} integer programs"
    return checked(problem, Plan(best.device_G, best.order_T, "exact", note))


def _first(problem: Problem, budget_s: float, seed: int) -> Found:
    starts = []
    for algorithm in (expert, heft, pipeline, interleaved, hints_only):
        try:
            starts.append(algorithm(problem, budget_s=budget_s, seed=seed))
        except PlacementError:
            continue
    return improve(problem, starts, budget_s, seed)


def _proved(best: Found, bound_s: float) -> bool:
    return best.score.over_bytes == 0 and best.score.step_s <= bound_s * (1 + _EQUAL)


def _serial_seconds(problem: Problem) -> float:
    """No plan that leaves no device idle without reason takes longer: all tasks and transfers one after the other."""
    slowest_T = np.where(np.isfinite(problem.seconds_TD), problem.seconds_TD, 0.0).max(axis=1)
    apart = ~np.eye(problem.devices, dtype=bool)
    if problem.devices == 1:
        return float(slowest_T.sum())
    wire_s = problem.latency_s_DD[apart].max() + problem.wire_bytes_K / problem.bytes_per_s_DD[apart].min()
    return float(slowest_T.sum() + (problem.devices - 1) * wire_s.sum())


def _conflicts(problem: Problem, device_G: Ints, start_s_T: Floats) -> Iterator[Conflict]:
    """Pairs of tasks that overlap on a device, and of transfers that overlap on a wire (with groups of readers)."""
    device_T = device_G[problem.group_T]
    end_s_T = start_s_T + problem.seconds_TD[np.arange(problem.tasks), device_T]
    little = 1e-7 * max(float(end_s_T.max(initial=0.0)), 1e-300)
    for device in range(problem.devices):
        own = np.flatnonzero(device_T == device)
        own = own[np.argsort(start_s_T[own], kind="stable")]
        for i, one in enumerate(own.tolist()):
            for other in own[i + 1 :].tolist():
                if start_s_T[other] >= end_s_T[one] - little:
                    break
                yield ("device", min(one, other), max(one, other), (0, 0))
    sent: list[tuple[int, float, float, int, int]] = []
    for tensor, producer in enumerate(problem.producer_K):
        source = device_T[producer]
        readers = problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]
        for target in sorted({int(device_T[r]) for r in readers} - {int(source)}):
            there = readers[device_T[readers] == target]
            seconds = transfer_seconds(problem, float(problem.wire_bytes_K[tensor]), int(source), target)
            group = int(problem.group_T[there[np.argmin(start_s_T[there])]])
            latest_s = float(start_s_T[there].min())
            if problem.wire_DD[source, target] < 0:
                continue
            sent.append((int(problem.wire_DD[source, target]), latest_s - seconds, latest_s, tensor, group))
    sent.sort()
    for i, (wire, _, end_s, tensor, group) in enumerate(sent):
        for wire2, begin2_s, _, tensor2, group2 in sent[i + 1 :]:
            if wire2 != wire or begin2_s >= end_s - little:
                break
            yield ("wire", tensor, tensor2, (group, group2))
