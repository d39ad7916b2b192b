"""A plain DQN loop for Atari, of the shape and with the settings of CleanRL's `dqn_atari.py`.

One game, one process: act, step the game, store, and at every fourth step learn from a batch of 32. As CleanRL has it,
wrappers and replay buffer are those of Stable-Baselines3; the loop is written anew from what CleanRL documents
(https://docs.cleanrl.dev/rl-algorithms/dqn/). Needs stable-baselines3, opencv, gymnasium, ale-py and torch.

    python bench/peers/dqn_loop.py --game Pong --seconds 60      # prints one JSON line
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from stable_baselines3.common import atari_wrappers as wrappers
from stable_baselines3.common.buffers import ReplayBuffer
from torch import nn

BATCH, EVERY, TARGET_EVERY, RATE, DISCOUNT = 32, 4, 1000, 1e-4, 0.99
FRAMES_PER_STEP = 4


def game(name: str) -> Any:
    """As CleanRL wraps it."""
    gymnasium.register_envs(ale_py)
    env: Any = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(f"{name}NoFrameskip-v4"))
    env = wrappers.EpisodicLifeEnv(wrappers.MaxAndSkipEnv(wrappers.NoopResetEnv(env, noop_max=30), skip=4))
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = wrappers.FireResetEnv(env)
    env = gymnasium.wrappers.ResizeObservation(wrappers.ClipRewardEnv(env), (84, 84))
    return gymnasium.wrappers.FrameStackObservation(gymnasium.wrappers.GrayscaleObservation(env), 4)


def network(actions: int) -> nn.Module:
    """Mnih et al. 2015."""
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, actions)),
    )


def main() -> None:
    """Play and learn for some seconds, after a warm-up without learning that does not count."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--game", default="Pong")
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--warm-up", type=int, default=1000)
    options.add_argument("--epsilon", type=float, default=0.1)
    given = options.parse_args()
    env = gymnasium.vector.SyncVectorEnv(
        [lambda: game(given.game)], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    online, target = network(env.single_action_space.n), network(env.single_action_space.n)
    target.load_state_dict(online.state_dict())
    rule = torch.optim.Adam(online.parameters(), lr=RATE)
    memory = ReplayBuffer(
        10_000,
        env.single_observation_space,
        env.single_action_space,
        optimize_memory_usage=True,
        handle_timeout_termination=False,
    )
    observation, _ = env.reset(seed=1)
    step, began = 0, 0.0
    while not began or time.perf_counter() - began < given.seconds:
        if step == given.warm_up:
            began, first = time.perf_counter(), step
        if step < given.warm_up or random.random() < given.epsilon:
            actions = np.array([env.single_action_space.sample()])
        else:
            with torch.no_grad():
                actions = online(torch.as_tensor(observation, dtype=torch.float32) / 255.0).argmax(1).numpy()
        after, rewards, ended, cut_short, info = env.step(actions)
        real = after.copy()
        if ended[0] or cut_short[0]:
            real[0] = info["final_obs"][0]
        memory.add(observation, real, actions, rewards, ended, [{}])
        observation = after
        if step >= given.warm_up and step % EVERY == 0:
            learn(online, target, rule, memory)
            if step % TARGET_EVERY == 0:
                target.load_state_dict(online.state_dict())
        step += 1
    seconds = time.perf_counter() - began
    print(json.dumps({"game": given.game, "frames_per_s": round(FRAMES_PER_STEP * (step - first) / seconds, 1)}))


def learn(online: nn.Module, target: nn.Module, rule: torch.optim.Optimizer, memory: ReplayBuffer) -> None:
    """One step on a batch."""
    batch = memory.sample(BATCH)
    with torch.no_grad():
        best = target(batch.next_observations.float() / 255.0).max(1).values
        wanted = batch.rewards.flatten() + DISCOUNT * best * (1 - batch.dones.flatten())
    values = online(batch.observations.float() / 255.0).gather(1, batch.actions).squeeze(1)
    loss = nn.functional.mse_loss(wanted, values)
    rule.zero_grad()
    loss.backward()
    rule.step()


if __name__ == "__main__":
    main()
