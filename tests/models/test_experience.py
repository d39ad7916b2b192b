"""Actors and the batches that come of what they play: repeatable, whatever ends; nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from millrace.errors import WorkerError
from millrace.models.actors import Playing
from millrace.models.experience import Experience, Pace, Priorities
from millrace.models.games import Kind
from millrace.models.q_learning import Values

KIND = Kind((4,), "float32", 1, 2)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Values(KIND, 16, dueling=False)


def experience() -> Experience:
    playing = Playing("CartPole-v1", 2, 3, True, 1000, clipped=False, seed=5)
    pace = Pace(capacity=3000, warm_up=200, every=4, epsilon=lambda _: 0.1, rows=8)
    return Experience(playing, KIND, pace, Priorities(0.0, lambda _: 1.0), 16, network)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_run_can_be_repeated() -> None:
    runs = []
    for _ in range(2):
        with experience() as batches:
            own, found = network(7), []
            batches.follow(own)
            for number, batch in enumerate(batches.until(batches=40)):
                if number == 20:
                    with torch.no_grad():
                        own.advantages.bias += torch.tensor([10.0, 0.0])  # type: ignore[operator, union-attr]
                found.append(torch.cat([part.flatten().double() for part in batch.values()]))
                if number % 7 == 0:
                    time.sleep(0.01)  # the actors' time must not matter
            runs.append(torch.stack(found))
    assert runs[0].equal(runs[1])


def test_actors_play_by_the_newest_weights() -> None:
    with experience() as batches:
        own = network()
        batches.follow(own)
        with torch.no_grad():
            own.advantages.bias += torch.tensor([0.0, 1000.0])  # type: ignore[operator, union-attr]
        *_, batch = batches.until(batches=200)
        assert batch["actions"].float().mean() > 0.85  # but for the random tenth; before, half of them
        assert 5 < float(batch["scores"][0]) < 15  # whoever only pushes to the right falls soon


def test_a_position_is_a_number_of_steps_and_the_memory_is_filled_again() -> None:
    with experience() as batches:
        for _ in batches.until(batches=13):
            pass
        position = batches.position()
    with experience() as other:
        other.seek(position)
        batch = other.advance()
        assert other.handed_out == 14
        assert batch["after"].shape == (16, 1, 4)


def test_what_was_played_before_can_be_forgotten() -> None:
    with experience() as batches:
        for _ in batches.until(batches=5):
            pass
        own = network()
        with torch.no_grad():
            own.advantages.bias += torch.tensor([1000.0, 0.0])  # type: ignore[operator, union-attr]
        batches.follow(own, forget=True)
        batch = batches.advance()
        assert batch["actions"].float().mean() < 0.3


def test_an_actor_that_ends_is_replaced() -> None:
    with experience() as batches:
        for number, batch in enumerate(batches.until(batches=60)):
            if number in (10, 30):
                os.kill(batches.actor_pids[number // 30], signal.SIGKILL)
            step = batch["after"] - batch["observations"]
            assert step.abs().max() < 2.0  # no transition leads from a game to another
        pids = batches.actor_pids
        assert len(alive(pids)) == 2
    assert alive(pids) == []


def test_actors_that_end_again_and_again_are_an_error() -> None:
    with experience() as batches:

        def killed() -> None:
            for _ in batches.until(batches=500):
                os.kill(batches.actor_pids[0], signal.SIGKILL)

        with pytest.raises(WorkerError, match="CartPole-v1, has ended or is stuck, as 3 others were before it"):
            killed()
        pids = batches.actor_pids
    assert alive(pids) == []


def test_who_closes_and_reads_on_has_others_play() -> None:
    with experience() as batches:
        first = next(iter(batches))
        pids = batches.actor_pids
        assert len(alive(pids)) == 2
        batches.close()
        assert alive(pids) == []
        second = batches.advance()
        assert first["after"].shape == second["after"].shape
        assert len(next(batches.one_pass())["actions"]) == 16
