"""From a graph, a cluster and hints to a placement: what runs where, in which order, and what is expected of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.place.anneal import anneal
from millrace.place.cluster import Cluster
from millrace.place.contention import expect
from millrace.place.demands import Demands, allowed_devices
from millrace.place.describe import describe
from millrace.place.grouping import Grouping, Task
from millrace.place.hints import Hints, refuse_idle
from millrace.place.memory import lacks_fast_memory
from millrace.place.order import best_order
from millrace.place.prepare import best_plan, group_like, prepare
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import Simulated
from millrace.place.wire import Wire

_SEARCH_S_PER_GROUP, _LONGEST_SEARCH_S = 0.1, 5.0


@dataclass(frozen=True, eq=False)
class Placement:
    """A plan for a graph on a cluster.

    tasks: those of `problem`, in its order: the graph's own, and before them the reading of variables for others.
    states_apart: whether variables and their updates are groups of their own, see `prepare.py`.
    """

    cluster: Cluster
    hints: Hints
    wire: Wire
    demands: Demands
    grouping: Grouping
    problem: Problem
    plan: Plan
    expected: Simulated
    states_apart: bool = False

    @property
    def device_of_group(self) -> dict[str, str]:
        """Group name -> device name."""
        names = self.problem.device_names_D
        return {g: names[d] for g, d in zip(self.problem.group_names_G, self.plan.device_G, strict=True)}

    @property
    def homes(self) -> dict[str, str]:
        """Variable name -> the device that it lives on."""
        names = self.problem.device_names_D
        return {variable: names[self.plan.device_G[g]] for variable, g in self.grouping.variables.items()}

    def ordered_tasks(self) -> list[tuple[Task, str]]:
        """The graph's tasks with their devices, in the order of the plan."""
        first = self.problem.tasks - len(self.grouping.tasks)
        names = self.problem.device_names_D
        found = []
        for index in self.plan.order_T:
            if index >= first:
                task = self.grouping.tasks[index - first]
                found.append((task, names[self.plan.device_G[task.group]]))
        return found


def place(
    graph: Graph,
    cluster: Cluster,
    hints: Hints | Mapping[str, str] | None = None,
    *,
    search: str = "auto",
    budget_s: float | None = None,
    seed: int = 0,
    fused: bool = True,
    limit: int = 40,
    wire: Wire | Mapping[str, str] | str | None = None,
) -> Placement:
    """Decide which device runs what.

    Args:
        graph: of the step, its batch already in microbatches.
        hints: see `Hints`; a mapping is of module paths to devices.
        search: the name of a placement algorithm, see `algorithms.registry`.
        budget_s: how long it may search; by default a tenth of a second for each group, at most five seconds.
        fused: whether the devices run compiled code.
        limit: how many groups there may be; more give a finer placement and a longer search.
        wire: what is narrowed between devices, see `Wire`. "zeros" counts as if nothing were saved.

    Raises: PlacementError when hints contradict, nothing fits in memory, or the cluster lacks something; SettingError
        when `wire` names a codec or a module that does not exist.
    """
    wishes, narrowed = Hints.of(hints), Wire.of(wire)
    if not graph.nodes or not cluster.devices:
        lacking = "the graph computes nothing" if cluster.devices else "the cluster has no devices"
        raise PlacementError(f"{lacking}, so there is nothing to place. Give `place` a step and at least one device.")
    refuse_idle(graph, wishes)
    narrowed.check(graph)
    demands = Demands(graph, wishes)
    ways = [prepare(graph, cluster, demands, narrowed, fused=fused, limit=limit)]
    if search == "auto" and lacks_fast_memory(ways[0].problem):
        more = prepare(graph, cluster, demands, narrowed, fused=fused, limit=limit, states_apart=True)
        ways.append(more)
    if budget_s is None:
        budget_s = min(_LONGEST_SEARCH_S, _SEARCH_S_PER_GROUP * ways[0].problem.groups)
    way, plan = best_plan(ways, search, budget_s=budget_s, seed=seed)
    expected = expect(way.problem, plan)
    chosen = (way.grouping, way.problem, plan, expected)
    return Placement(cluster, wishes, narrowed, demands, *chosen, way.states_apart)


def search_at_hand() -> bool:
    """Whether `place` can begin at once; otherwise its inner loops are compiled first, once on a machine."""
    return anneal.at_hand


def follow(placement: Placement, graph: Graph, *, fused: bool = True) -> Placement:
    """The same devices for another graph of the same step: for other fetches, or a batch of another size.

    Raises: PlacementError when what only this graph has cannot be placed as wished.
    """
    cluster, hints, wire = placement.cluster, placement.hints, placement.wire
    demands = Demands(graph, hints, placement.demands)
    apart = placement.states_apart
    grouping = group_like(graph, demands, placement.grouping, states_apart=apart)
    allowed = allowed_devices(grouping, cluster, demands)
    new = len(grouping.groups) - len(placement.grouping.groups)
    device_G = np.concatenate([placement.plan.device_G, np.zeros(new, dtype=np.int64)])
    lost_G = ~allowed[np.arange(len(device_G)), device_G]
    device_G[lost_G] = allowed[lost_G].argmax(axis=1)
    problem = describe(graph, grouping, cluster, allowed, wire, fused=fused)
    plan = Plan(device_G, best_order(problem, device_G), placement.plan.algorithm, "as planned before")
    return Placement(cluster, hints, wire, demands, grouping, problem, plan, expect(problem, plan), apart)
