"""Eager PyTorch. Option: `optimizer`, "default", "foreach" or "fused"."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.models import autocast, compute_loss, device_memory, load, make_optimizer, versions
from bench.protocol import Peer, serve


def build(task: dict[str, Any]) -> Peer:
    workload, model, batch = load(task)
    optimizer = make_optimizer(workload, model, task["options"].get("optimizer", "default"))

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(task):
            loss = compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def run(steps: int) -> Tensor:
        for _ in range(steps - 1):
            step()
        return step()

    return Peer(run, float, versions(), **device_memory(task))


if __name__ == "__main__":
    serve(build)
