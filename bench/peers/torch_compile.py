"""`torch.compile` of model and loss, and of the optimizer's step if it is told so.

Options: `optimizer`, "default", "fused" or "compiled"; `mode`, torch.compile's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.models import autocast, compute_loss, device_memory, load, make_optimizer, versions
from bench.protocol import Peer, serve


def build(task: dict[str, Any]) -> Peer:
    workload, model, batch = load(task)
    way = task["options"].get("optimizer", "default")
    optimizer = make_optimizer(workload, model, way)
    compiled = torch.compile(compute_loss, mode=task["options"].get("mode"))

    def update() -> None:
        optimizer.step()

    if way == "compiled":
        update = torch.compile(update, fullgraph=False)

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(task):
            loss = compiled(model, batch)
        loss.backward()
        update()
        return loss.detach()

    def run(steps: int) -> Tensor:
        for _ in range(steps - 1):
            step()
        return step()

    return Peer(run, float, versions(), **device_memory(task))


if __name__ == "__main__":
    serve(build)
