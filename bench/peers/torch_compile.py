"""`torch.compile` of model and loss, the optimizer as it is.

Options: `fused` takes the optimizer's one-kernel implementation, `mode` is torch.compile's.
"""

from __future__ import annotations

from typing import Any

import torch
from models import autocast, compute_loss, device_memory, load, make_optimizer, versions
from protocol import Peer, serve
from torch import Tensor


def build(task: dict[str, Any]) -> Peer:
    workload, model, batch = load(task)
    optimizer = make_optimizer(workload, model, fused=task["options"].get("fused", False))
    compiled = torch.compile(compute_loss, mode=task["options"].get("mode"))

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(task):
            loss = compiled(model, batch)
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
