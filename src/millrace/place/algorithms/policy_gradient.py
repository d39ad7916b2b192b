"""A recurrent network that learns to place groups from the simulated step time.

Source: Mirhoseini et al. 2017, "Device placement optimization with reinforcement learning": a policy reads the groups
one after the other and chooses a device for each; REINFORCE with a moving average as the baseline; the reward is minus
the square root of the step time. Their step was measured; here it is simulated, some thousand times as often.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from millrace.place.algorithms.finish import checked
from millrace.place.devices import pinned_devices, pipeline_order
from millrace.place.evaluate import Evaluator, Score
from millrace.place.order import best_scored, list_order
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables

_WIDTH = 48
_SAMPLES = 16  # placements in an update
_UPDATES = 400
_RATE, _ENTROPY = 3e-3, 0.02
_OVER = 10.0  # the price of all memory once more, in steps


class Policy(nn.Module):
    """A bidirectional GRU reads all groups; a second one chooses their devices, with attention to what the first read.

    Shapes: G groups in forward order, F features, D devices, N samples.
    """

    def __init__(self, features: int, devices: int) -> None:
        super().__init__()
        self.read = nn.GRU(features, _WIDTH, bidirectional=True, batch_first=True)
        self.choose = nn.GRUCell(2 * _WIDTH + devices, _WIDTH)
        self.query = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.head = nn.Linear(3 * _WIDTH, devices)

    def forward(self, features_GF: Tensor, allowed_GD: Tensor, draws_GN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample placements. Returns: devices [N, G], their log-probabilities [N] and the mean entropy."""
        groups, samples = draws_GN.shape
        read_GE = self.read(features_GF[None])[0][0]
        state = torch.zeros(samples, _WIDTH)
        before = torch.zeros(samples, allowed_GD.shape[1])
        chosen, log_N, entropy = [], torch.zeros(samples), torch.zeros(())
        for g in range(groups):
            state = self.choose(torch.cat([read_GE[g].expand(samples, -1), before], dim=1), state)
            attention = torch.softmax(self.query(state) @ read_GE.T / _WIDTH**0.5, dim=1)
            logits = self.head(torch.cat([state, attention @ read_GE], dim=1))
            log_ND = torch.log_softmax(logits.masked_fill(~allowed_GD[g], -1e9), dim=1)
            device_N = (log_ND.exp().cumsum(dim=1) < draws_GN[g, :, None]).sum(dim=1).clamp(max=log_ND.shape[1] - 1)
            before = nn.functional.one_hot(device_N, log_ND.shape[1]).float()
            log_N = log_N + (log_ND * before).sum(dim=1)
            entropy = entropy - (log_ND.exp() * log_ND).sum(dim=1).mean() / groups
            chosen.append(device_N)
        return torch.stack(chosen, dim=1), log_N, entropy


def policy_gradient(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Train a policy on this problem, and take the best placement that it has drawn.

    Raises: PlacementError when none of them fits.
    """
    deadline = time.monotonic() + budget_s
    pinned_devices(problem)
    row = pipeline_order(problem)
    allowed_GD = torch.from_numpy(tables(problem).allowed_GD[row])
    features_GF = torch.from_numpy(_features(problem)[row]).float()
    evaluator, random = Evaluator(problem), np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(features_GF.shape[1], problem.devices)
    optimizer = torch.optim.Adam(policy.parameters(), lr=_RATE)
    best: tuple[float, float, Ints] = (np.inf, np.inf, np.zeros(problem.groups, dtype=np.int64))
    baseline, unit_s, updates = None, 0.0, 0
    while updates < _UPDATES and (updates == 0 or time.monotonic() < deadline):
        draws_GN = torch.from_numpy(random.random((problem.groups, _SAMPLES))).float()
        chosen_NG, log_N, entropy = policy(features_GF, allowed_GD, draws_GN)
        costs = np.empty(_SAMPLES)
        for n, choice in enumerate(chosen_NG.numpy()):
            device_G = np.empty(problem.groups, dtype=np.int64)
            device_G[row] = choice
            score = evaluator.score(device_G, list_order(problem, device_G))
            best = min(best, (score.over_bytes, score.step_s, device_G), key=lambda found: found[:2])
            costs[n] = _cost(problem, score)
        unit_s = unit_s or float(costs.mean())
        reward_N = -np.sqrt(costs / unit_s)
        baseline = reward_N.mean() if baseline is None else 0.9 * baseline + 0.1 * reward_N.mean()
        advantage_N = (reward_N - baseline) / (reward_N.std() + 1e-6)
        loss = -(torch.from_numpy(advantage_N).float() * log_N).mean() - _ENTROPY * problem.groups * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        updates += 1
    device_G = best[2]
    note = f"the best of {updates * _SAMPLES} placements drawn in {updates} updates"
    return checked(problem, Plan(device_G, best_scored(problem, device_G)[0], "policy_gradient", note))


def _cost(problem: Problem, score: Score) -> float:
    return score.step_s * (1 + _OVER * score.over_bytes / float(problem.memory_bytes_D.sum()))


def _features(problem: Problem) -> Floats:
    """What the policy knows of each group: seconds by device, bytes, traffic with the groups around it: [G, F]."""
    made = tables(problem)
    seconds_GD = np.where(made.allowed_GD, made.seconds_GD, 0.0)
    source_G = problem.group_T[np.repeat(problem.producer_K, np.diff(problem.first_use_K1))]
    target_G = problem.group_T[problem.uses_C]
    bytes_C = np.repeat(problem.wire_bytes_K, np.diff(problem.first_use_K1)) * (source_G != target_G)
    sent_G = np.bincount(source_G, weights=bytes_C, minlength=problem.groups)
    received_G = np.bincount(target_G, weights=bytes_C, minlength=problem.groups)
    links_G = np.bincount(target_G, weights=source_G != target_G, minlength=problem.groups)
    columns = [*seconds_GD.T, problem.resident_bytes_G, made.held_bytes_G, sent_G, received_G, links_G]
    features = np.stack([column / max(float(np.max(column, initial=0.0)), 1e-30) for column in columns], axis=1)
    place_G = np.argsort(pipeline_order(problem)) / max(problem.groups - 1, 1)
    return np.concatenate([features, made.allowed_GD, place_G[:, None]], axis=1)
