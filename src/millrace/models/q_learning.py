"""Deep Q-learning: a network that tells what actions are worth, and what it should have told.

V. Mnih et al., "Human-level control through deep reinforcement learning", 2015; H. van Hasselt et al., "Deep
reinforcement learning with double Q-learning", 2016; Z. Wang et al., "Dueling network architectures for deep
reinforcement learning", 2016.

Shape suffixes: B transitions, N games, S frames in an observation, A actions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from millrace.models.games import Kind


class Values(nn.Module):
    """Observations [N, S, …] to values of actions [N, A]: convolutions where they are pictures (Mnih et al. 2015)."""

    def __init__(self, kind: Kind, width: int, dueling: bool) -> None:
        super().__init__()
        self.pictures = len(kind.frame) == 2
        self.body = _convolutions(kind) if self.pictures else _layers(kind, width)
        features = 512 if self.pictures else width
        self.advantages = nn.Linear(features, kind.actions)
        self.state = nn.Linear(features, 1) if dueling else None

    def forward(self, observations: Tensor) -> Tensor:
        """Points of pictures are uint8."""
        features = self.body(observations.float() / 255 if self.pictures else observations)
        values_NA = cast(Tensor, self.advantages(features))
        if self.state is not None:
            values_NA = self.state(features) + values_NA - values_NA.mean(-1, keepdim=True)
        return values_NA


class Learner(nn.Module):
    """A network, the older one (`target`) that gives it its targets, and how far they are apart."""

    steps: Tensor
    errors: Tensor | None

    def __init__(self, online: nn.Module, target_every: int, double: bool, errors: int) -> None:
        """errors: how many are kept for `Experience.prioritize`: a batch's, or 0."""
        super().__init__()
        self.online = online
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.target_every, self.doubled = target_every, double
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("errors", torch.zeros(errors) if errors else None)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The values [B] of what was done, and what they should be."""
        values_BA = self.online(batch["observations"])
        value_B = values_BA.gather(1, batch["actions"][:, None])[:, 0]
        with torch.no_grad():
            self._renew_target()
            after_BA = self.target(batch["after"])
            best_B1 = (self.online(batch["after"]) if self.doubled else after_BA).argmax(-1, keepdim=True)
            after_B = after_BA.gather(1, best_B1)[:, 0]
            target_B = batch["rewards"] + batch["discounts"] * after_B
            if self.errors is not None:
                self.errors.copy_(target_B - value_B)
        return value_B, target_B

    def _renew_target(self) -> None:
        """Take over the weights at every `target_every`th step. Part of the step's graph, so it has no branches."""
        due = self.steps % self.target_every == 0
        for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
            old.copy_(torch.where(due, new, old))
        self.steps.add_(1)


def _convolutions(kind: Kind) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(kind.stack, 32, 8, stride=4), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 7 * 7, 512), nn.ReLU()),
    )


def _layers(kind: Kind, width: int) -> nn.Module:
    inputs = nn.Linear(kind.stack * kind.frame[0], width)
    return nn.Sequential(nn.Flatten(), inputs, nn.ReLU(), nn.Linear(width, width), nn.ReLU())
