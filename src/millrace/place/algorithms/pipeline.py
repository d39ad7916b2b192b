"""Contiguous ranges of groups on an order of devices: the best by dynamic programming.

Source: the objective is that of Zheng et al. 2022 (Alpa, equation 2): with M microbatches a step takes the sum of all
stages for one microbatch and M - 1 times the slowest stage. Without microbatches it is the sum. Harlap et al. 2018
(PipeDream) minimise the slowest stage alone.
"""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace.errors import PlacementError
from millrace.place.algorithms.finish import finish
from millrace.place.devices import device_sequences, pinned_devices, pipeline_order
from millrace.place.order import best_scored
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables

_CUTS = 96  # with more groups, ranges end only at so many places
_BOUNDS = 100  # so many slowest stages are tried, all where there are fewer
_SEQUENCES = 64
_SIMULATED = 12


@dataclass(frozen=True, eq=False)
class Chain:
    """Groups in a row. N places where a range may begin or end (the first is 0, the last the number of groups)."""

    order: Ints  # the groups in the row
    cuts_N: Ints
    seconds_ND: Floats  # of all groups before a place that may run there
    barred_ND: Floats  # how many groups before a place may not run there
    fixed_bytes_N: Floats  # variables before a place
    held_bytes_N: Floats  # what waits for the backward pass, for one microbatch
    working_bytes_NN: Floats  # the largest task between two places
    forward_bytes_N: Floats  # what crosses a place in a step, and in how many tensors
    forward_tensors_N: Floats
    backward_bytes_N: Floats
    backward_tensors_N: Floats


def pipeline(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """The best pipeline of stages over all orders of devices and subsets of them (the most different ones, at most).

    Groups that may run on one device only are set apart and go there. Of the best pipelines of the orders, the one
    that is fastest in simulation is taken.

    Raises: PlacementError when no pipeline fits.
    """
    pinned_G = pinned_devices(problem)
    if (pinned_G >= 0).all():
        return finish(problem, pinned_G, "pipeline", "hints place every group")
    deadline = time.monotonic() + budget_s
    found: list[tuple[float, tuple[int, ...], Ints]] = []
    for strict in (True, False):  # what the estimate of memory refuses may fit all the same
        chain = chain_of(problem, pinned_G)
        for devices in device_sequences(problem, _SEQUENCES):
            value, places = best_ranges(problem, chain, devices, memory=strict)
            if np.isfinite(value):
                found.append((value, devices, placement_of(chain, devices, places, pinned_G)))
            if time.monotonic() > deadline:
                break
        if found:
            break
    if not found:
        raise PlacementError(
            "pipeline found no contiguous ranges: some groups may run on some devices only, and these do not follow "
            "each other. Use 'heft', 'local_search' or 'auto', which take groups one by one."
        )
    found.sort(key=lambda f: f[0])
    scored = [(best_scored(problem, device_G)[1], devices, device_G) for _, devices, device_G in found[:_SIMULATED]]
    _, devices, device_G = min(scored, key=lambda s: (s[0].over_bytes, s[0].step_s))
    names = " → ".join(problem.device_names_D[d] for d in devices)
    return finish(problem, device_G, "pipeline", f"{len(devices)} stages on {names}, of {len(found)} orders of devices")


def best_ranges(
    problem: Problem, chain: Chain, devices: tuple[int, ...], *, memory: bool = True
) -> tuple[float, list[int]]:
    """The best division of a chain over an order of devices, each with at least one group.

    Returns: the time of the step in seconds by the formula above, infinite when there is no division, and the places
    where the ranges begin and end (indices into `cuts_N`).
    """
    microbatches = tables(problem).microbatches
    stage_SNN = np.stack([_stage_seconds(problem, chain, devices, s, memory) for s in range(len(devices))])
    pairs = list(itertools.pairwise(devices))
    there_SN = [_wire_seconds(problem, chain.forward_tensors_N, chain.forward_bytes_N, a, b) for a, b in pairs]
    back_SN = [_wire_seconds(problem, chain.backward_tensors_N, chain.backward_bytes_N, b, a) for a, b in pairs]
    first_SN = np.array([np.zeros(len(chain.cuts_N)), *(t + b for t, b in zip(there_SN, back_SN, strict=True))])
    slowest_SN = np.array([np.zeros(len(chain.cuts_N)), *map(np.maximum, there_SN, back_SN)])
    best: tuple[float, list[int]] = (float("inf"), [])
    least = _divide(stage_SNN, first_SN, slowest_SN, np.inf)[0] / microbatches
    if not np.isfinite(least):
        return best
    every = np.unique(np.concatenate([stage_SNN[np.isfinite(stage_SNN)], slowest_SN.ravel()]))
    # What a bound allows, a higher one allows, too: the search begins at the least that allows anything.
    first = bisect.bisect_left(every, True, key=lambda b: np.isfinite(_divide(stage_SNN, first_SN, slowest_SN, b)[0]))
    bounds = every[first:] if microbatches > 1 else np.array([np.inf])
    for bound in bounds[np.unique(np.linspace(0, len(bounds) - 1, _BOUNDS).astype(int))]:
        turns_s = (microbatches - 1) / microbatches * bound if microbatches > 1 else 0.0
        if turns_s + least >= best[0]:
            break
        value, places = _divide(stage_SNN, first_SN, slowest_SN, bound)
        if value / microbatches + turns_s < best[0]:
            best = (value / microbatches + turns_s, places)
    return best


def _divide(stage_SNN: Floats, first_SN: Floats, slowest_SN: Floats, bound_s: float) -> tuple[float, list[int]]:
    """The division with the least sum in which no stage and no wire takes longer than `bound_s` a step."""
    stages, places = first_SN.shape
    least_N = np.full(places, np.inf)
    least_N[0] = 0.0
    chosen = np.zeros((stages, places), dtype=np.int64)
    for s in range(stages):
        until_N = np.where(slowest_SN[s] <= bound_s, least_N + first_SN[s], np.inf)
        sum_NN = until_N[:, None] + np.where(stage_SNN[s] <= bound_s, stage_SNN[s], np.inf)
        chosen[s] = sum_NN.argmin(axis=0)
        least_N = sum_NN[chosen[s], np.arange(places)]
    way = [places - 1]
    for s in range(stages - 1, -1, -1):
        way.append(int(chosen[s][way[-1]]))
    return float(least_N[-1]), way[::-1]


def _stage_seconds(problem: Problem, chain: Chain, devices: tuple[int, ...], stage: int, memory: bool) -> Floats:
    """What a range takes a step as this stage, by its two places; infinite where it is empty or does not fit."""
    device = devices[stage]
    seconds_N, barred_N = chain.seconds_ND[:, device], chain.barred_ND[:, device]
    seconds_NN = seconds_N[None, :] - seconds_N[:, None]
    seconds_NN = np.where(barred_N[None, :] > barred_N[:, None], np.inf, seconds_NN)
    opened = min(tables(problem).microbatches, len(devices) - stage)
    needs_N = chain.fixed_bytes_N + opened * chain.held_bytes_N
    needs_NN = needs_N[None, :] - needs_N[:, None] + chain.working_bytes_NN
    places = np.arange(len(seconds_N))
    fits_NN: NDArray[np.bool_] = needs_NN <= problem.memory_bytes_D[device] if memory else needs_NN == needs_NN
    return np.where((places[:, None] < places[None, :]) & fits_NN, seconds_NN, np.inf)


def _wire_seconds(problem: Problem, tensors_N: Floats, bytes_N: Floats, source: int, target: int) -> Floats:
    """What the transfers across each place take in a step."""
    link = problem.latency_s_DD[source, target], problem.bytes_per_s_DD[source, target]
    return np.asarray(np.where(tensors_N > 0, tensors_N * link[0], 0.0) + bytes_N / link[1])


def chain_of(problem: Problem, pinned_G: Ints) -> Chain:
    """The groups that no hint pins (-1 in `pinned_G`), in the order of the forward pass, with their sums."""
    made = tables(problem)
    order = pipeline_order(problem)
    order = order[pinned_G[order] < 0]
    count = len(order)
    cuts_N = np.unique(np.linspace(0, count, min(count, _CUTS) + 1).astype(np.int64))

    def before(values: Floats) -> Floats:
        return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values[order], axis=0)])[cuts_N]

    working_NN = np.zeros((len(cuts_N), len(cuts_N)))
    for i, first in enumerate(cuts_N):
        running = np.maximum.accumulate(np.concatenate([[0.0], made.working_bytes_G[order[first:]]]))
        working_NN[i, i:] = running[cuts_N[i:] - first]
    place_G = np.full(problem.groups, -1)
    place_G[order] = np.arange(count)
    crossing = np.zeros((4, count + 2))
    for tensor, producer in enumerate(problem.producer_K):
        made_at = place_G[problem.group_T[producer]]
        reader_groups = problem.group_T[problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]]
        read_at = place_G[reader_groups]
        read_at = read_at[read_at >= 0]
        if made_at < 0 or not len(read_at):
            continue
        size = problem.wire_bytes_K[tensor]
        for row, (low, high) in ((0, (made_at, read_at.max())), (2, (read_at.min(), made_at))):
            if high > low:  # it crosses the places low + 1 … high
                crossing[row, [low + 1, high + 1]] += [size, -size]
                crossing[row + 1, [low + 1, high + 1]] += [1, -1]
    across = np.cumsum(crossing, axis=1)[:, cuts_N]
    return Chain(
        order=order,
        cuts_N=cuts_N,
        seconds_ND=before(np.where(made.allowed_GD, made.seconds_GD, 0.0)),
        barred_ND=before((~made.allowed_GD).astype(float)),
        fixed_bytes_N=before(problem.resident_bytes_G),
        held_bytes_N=before(made.held_bytes_G),
        working_bytes_NN=working_NN,
        forward_bytes_N=across[0],
        forward_tensors_N=across[1],
        backward_bytes_N=across[2],
        backward_tensors_N=across[3],
    )


def placement_of(chain: Chain, devices: tuple[int, ...], places: list[int], pinned_G: Ints) -> Ints:
    """The placement that divides a chain at these places; other groups where they are pinned."""
    device_G = pinned_G.copy()
    for device, begin, end in zip(devices, places, places[1:], strict=False):
        device_G[chain.order[chain.cuts_N[begin] : chain.cuts_N[end]]] = device
    return device_G
