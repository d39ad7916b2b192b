"""Placement and order as an integer program whose sequencing constraints come one by one.

Binary x[g, d] puts group g on device d; s[t] is the start of task t; C, which is minimised, the end of the step. For
two groups that exchange tensors, z[d, e] tells that they are on d and e (it splits x, as in a transportation problem,
which is tighter than z >= x + x - 1). Binary y orders two tasks that would overlap on a device, or two transfers on a
wire; most pairs never need one. Without some of these constraints the optimum is still a lower bound.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from millrace.errors import PlacementError
from millrace.place.devices import device_classes
from millrace.place.problem import Floats, Ints, Problem
from millrace.place.tables import tables, transfer_seconds

Terms = Iterable[tuple[int, float]]


class ExactModel:
    """Rows `terms <= limit` over variables with bounds. latest_s: the end of a step that is known to be possible."""

    def __init__(self, problem: Problem, latest_s: float) -> None:
        self.problem, self.latest_s = problem, latest_s
        self._wire_far_s = latest_s + _slowest_transfer(problem)  # no arrival that counts is further from a start
        self._rows: list[tuple[list[int], list[float], float]] = []
        self._upper: list[float] = []
        self._binary: list[int] = []
        G, T, D = problem.groups, problem.tasks, problem.devices
        allowed_GD = tables(problem).allowed_GD
        self._x = [[self._add(float(allowed_GD[g, d]), binary=1) for d in range(D)] for g in range(G)]
        self._s = [self._add(latest_s) for _ in range(T)]
        self._end = self._add(latest_s)
        self._z: dict[tuple[int, int], list[list[int]]] = {}
        self._arrivals: dict[tuple[int, int], int] = {}
        for g in range(G):
            self._equal([(v, 1.0) for v in self._x[g]], 1.0)
        self._precedences()
        self._loads()
        self._memory()
        self._symmetry()

    def solve(self, budget_s: float) -> tuple[float, Ints | None, Floats | None]:
        """Returns: a lower bound of the step, the device of each group and the start of each task, if found in time."""
        optimize, sparse = _scipy("optimize"), _scipy("sparse")
        count = len(self._upper)
        sizes = [len(columns) for columns, _, _ in self._rows]
        columns = np.concatenate([np.array(c) for c, _, _ in self._rows])
        values = np.concatenate([np.array(v) for _, v, _ in self._rows])
        matrix = sparse.csr_array(
            (values, columns, np.concatenate([[0], np.cumsum(sizes)])), shape=(len(self._rows), count)
        )
        objective = np.zeros(count)
        objective[self._end] = 1.0
        integrality = np.zeros(count)
        integrality[self._binary] = 1
        result = optimize.milp(
            objective,
            integrality=integrality,
            bounds=optimize.Bounds(np.zeros(count), np.array(self._upper)),
            constraints=optimize.LinearConstraint(matrix, ub=np.array([limit for _, _, limit in self._rows])),
            options={"time_limit": max(budget_s, 0.01), "mip_rel_gap": 1e-6},
        )
        if result.status == 2:  # infeasible: nothing ends before the latest end
            return self.latest_s, None, None
        bound = float(result.mip_dual_bound) if result.get("mip_dual_bound") is not None else 0.0
        if result.x is None:
            return bound, None, None
        device_G = np.array([int(np.argmax(result.x[row])) for row in self._x], dtype=np.int64)
        return bound, device_G, np.array(result.x[self._s])

    def separate(self, one: int, other: int) -> None:
        """Two tasks run one after the other wherever they are on one device."""
        problem, far = self.problem, self.latest_s
        a, b = int(problem.group_T[one]), int(problem.group_T[other])
        first = self._add(1.0, binary=1)
        for device in range(problem.devices):
            both = [(self._x[a][device], far), (self._x[b][device], far)] if a != b else [(self._x[a][device], 2 * far)]
            for early, late, sign in ((one, other, 1.0), (other, one, -1.0)):
                limit = 2 * far + (far if sign > 0 else 0.0)
                self._row([*self._ends(early), (self._s[late], -1.0), (first, sign * far), *both], limit)

    def separate_transfers(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Two transfers (tensor, group of a reader) go one after the other wherever they take the same wire."""
        problem, far = self.problem, self._wire_far_s
        first = self._add(1.0, binary=1)
        pairs = np.argwhere(problem.wire_DD >= 0)
        for source, target in pairs:
            for source2, target2 in pairs[problem.wire_DD[tuple(pairs.T)] == problem.wire_DD[source, target]]:
                places = ((one, source, target), (other, source2, target2))
                active = [(v, far) for (k, g), a, b in places for v in (self._source(k)[a], self._x[g][b])]
                limit = len(active) * far
                for (early, late), sign in (((0, 1), 1.0), ((1, 0), -1.0)):
                    (k1, _), _, to1 = places[early]
                    (k2, _), from2, to2 = places[late]
                    seconds = transfer_seconds(problem, problem.wire_bytes_K[k2], int(from2), int(to2))
                    terms = [(self._arrival(k1, int(to1)), 1.0), (self._arrival(k2, int(to2)), -1.0)]
                    late_far = far if sign > 0 else 0.0
                    self._row([*terms, (first, sign * far), *active], limit + late_far - seconds)

    def _arrival(self, tensor: int, target: int) -> int:
        """The variable for when a tensor reaches a device; its readers there wait for it."""
        if (tensor, target) not in self._arrivals:
            problem, far = self.problem, self._wire_far_s
            arrival = self._arrivals[tensor, target] = self._add(2 * far)
            producer = int(problem.producer_K[tensor])
            for source in range(problem.devices):
                if source != target:
                    seconds = transfer_seconds(problem, problem.wire_bytes_K[tensor], source, target)
                    # far for the producer elsewhere: then this row says nothing
                    terms = [*self._ends(producer), (arrival, -1.0), (self._source(tensor)[source], far)]
                    self._row(terms, far - seconds)
            for reader in self._readers(tensor):
                x = self._x[int(problem.group_T[reader])][target]
                self._row([(arrival, 1.0), (self._s[reader], -1.0), (x, far)], far)
        return self._arrivals[tensor, target]

    def _precedences(self) -> None:
        problem = self.problem
        for tensor, producer in enumerate(problem.producer_K):
            for reader in self._readers(tensor):
                a, b = int(problem.group_T[producer]), int(problem.group_T[reader])
                wire: list[tuple[int, float]] = []
                if a != b:
                    for d, row in enumerate(self._both(a, b)):
                        for e, variable in enumerate(row):
                            if d != e:
                                seconds = transfer_seconds(problem, problem.wire_bytes_K[tensor], d, e)
                                wire.append((variable, seconds))
                self._row([*self._ends(int(producer)), (self._s[reader], -1.0), *wire], 0.0)
        for task in range(problem.tasks):
            self._row([*self._ends(task), (self._end, -1.0)], 0.0)

    def _both(self, a: int, b: int) -> list[list[int]]:
        """z[d][e] of two groups."""
        if (b, a) in self._z:
            return [list(row) for row in zip(*self._z[b, a], strict=True)]
        if (a, b) not in self._z:
            devices = range(self.problem.devices)
            z = self._z[a, b] = [[self._add(1.0) for _ in devices] for _ in devices]
            for d in devices:
                self._equal([(self._x[a][d], -1.0), *((v, 1.0) for v in z[d])], 0.0)
                self._equal([(self._x[b][d], -1.0), *((z[e][d], 1.0) for e in devices)], 0.0)
        return self._z[a, b]

    def _loads(self) -> None:
        """A step takes at least as long as its busiest device."""
        seconds_GD = tables(self.problem).seconds_GD
        for d in range(self.problem.devices):
            terms = [(self._x[g][d], float(s)) for g, s in enumerate(seconds_GD[:, d]) if np.isfinite(s)]
            self._row([*terms, (self._end, -1.0)], 0.0)

    def _memory(self) -> None:
        """While a task runs, what earlier tasks of a group made for later ones of it is on the device of the group."""
        problem = self.problem
        if problem.resident_bytes_G.sum() + problem.bytes_K.sum() <= problem.memory_bytes_D.min():
            return
        after_TT = _descendants(problem)
        seen: set[bytes] = set()
        for task in range(problem.tasks):
            held_G = problem.resident_bytes_G.copy()
            for tensor, producer in enumerate(problem.producer_K):
                group = problem.group_T[producer]
                own = [r for r in self._readers(tensor) if problem.group_T[r] == group]
                later = producer == task or any(r == task or after_TT[task, r] for r in own)
                if (producer == task or after_TT[producer, task]) and later:
                    held_G[group] += problem.bytes_K[tensor]
            if held_G.tobytes() not in seen:
                seen.add(held_G.tobytes())
                for d in range(problem.devices):
                    if held_G.sum() > problem.memory_bytes_D[d]:
                        # scaled: an integer program must not compare bytes with seconds
                        scaled = held_G / problem.memory_bytes_D[d]
                        self._row([(self._x[g][d], float(v)) for g, v in enumerate(scaled) if v], 1.0)

    def _symmetry(self) -> None:
        """Of devices that are alike, a later one takes a group only when an earlier one has taken one before."""
        class_D = device_classes(self.problem)
        for kind in np.unique(class_D):
            members = np.flatnonzero(class_D == kind)
            for earlier, later in itertools.pairwise(members):
                for g in range(self.problem.groups):
                    taken = [(self._x[h][earlier], -1.0) for h in range(g)]
                    self._row([(self._x[g][later], 1.0), *taken], 0.0)

    def _readers(self, tensor: int) -> Ints:
        problem = self.problem
        return problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]

    def _source(self, tensor: int) -> list[int]:
        return self._x[int(self.problem.group_T[self.problem.producer_K[tensor]])]

    def _ends(self, task: int) -> list[tuple[int, float]]:
        """The end of a task: its start, and its seconds on the device of its group."""
        x, seconds_D = self._x[int(self.problem.group_T[task])], self.problem.seconds_TD[task]
        return [(self._s[task], 1.0), *((x[d], float(s)) for d, s in enumerate(seconds_D) if np.isfinite(s))]

    def _add(self, upper: float, binary: int = 0) -> int:
        self._upper.append(upper)
        if binary:
            self._binary.append(len(self._upper) - 1)
        return len(self._upper) - 1

    def _row(self, terms: Terms, limit: float) -> None:
        summed: dict[int, float] = {}
        for variable, value in terms:
            summed[variable] = summed.get(variable, 0.0) + value
        self._rows.append((list(summed), list(summed.values()), limit))

    def _equal(self, terms: list[tuple[int, float]], value: float) -> None:
        self._row(terms, value)
        self._row([(variable, -v) for variable, v in terms], -value)


def _scipy(part: str) -> Any:
    """A module of scipy, which nothing else here needs. Raises: PlacementError where it is not installed."""
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise PlacementError(
            f"the algorithm 'exact' solves integer programs with scipy, which cannot be imported ({error}). "
            "Run `pip install \"millrace[place]\"`, or use 'auto'."
        ) from error


def _slowest_transfer(problem: Problem) -> float:
    apart = ~np.eye(problem.devices, dtype=bool)
    if problem.devices == 1:
        return 0.0
    largest = problem.wire_bytes_K.max(initial=0.0)
    return float((problem.latency_s_DD[apart] + largest / problem.bytes_per_s_DD[apart]).max())


def _descendants(problem: Problem) -> Floats:
    """[T, T] whether the second task needs the first."""
    after_TT = np.zeros((problem.tasks, problem.tasks), dtype=bool)
    made = tables(problem)
    for task in range(problem.tasks):
        for producer in problem.producer_K[made.read_by(task)]:
            after_TT[:, task] |= after_TT[:, producer]
            after_TT[producer, task] = True
    return after_TT
