"""What a step costs, measured on this machine, for simulated runs of many."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import compute_loss, make_batch, make_model
from bench.workloads import WORKLOADS
from millrace.zoo.digits import Digits, DigitsSettings

_BYTES = 32_000_000  # of each tensor that sums and updates are timed with
_ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of one thread. message_s: one way between two threads over a loopback connection, as an added latency."""

    digits_s: float
    digits_bytes: int
    digits_examples: int
    transformer_s: float
    transformer_bytes: int
    transformer_examples: int
    sum_s_per_byte: float
    apply_s_per_byte: float
    message_s: float

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def measure() -> Costs:
    """Run forward and backward of two models, AdamW's fused update, a sum, and a message, each some times.

    Everything is the least of several rounds: other work on the machine makes times longer, never shorter.
    """
    torch.set_num_threads(1)
    task = Digits(DigitsSettings())
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))
    digits = task.model(None)  # type: ignore[arg-type]
    transformer = make_model(WORKLOADS["transformer"])
    batch = make_batch(WORKLOADS["transformer"])
    parameter = nn.Parameter(torch.randn(_BYTES // 4))
    parameter.grad = torch.randn_like(parameter)
    adamw = torch.optim.AdamW([parameter], fused=True)
    total, one = torch.zeros(_BYTES // 4), torch.ones(_BYTES // 4)
    return Costs(
        digits_s=_least_s(lambda: _gradients(digits, lambda: nn.functional.cross_entropy(digits(images), labels)), 20),
        digits_bytes=_bytes(digits),
        digits_examples=64,
        transformer_s=_least_s(lambda: _gradients(transformer, lambda: compute_loss(transformer, batch)), 1),
        transformer_bytes=_bytes(transformer),
        transformer_examples=WORKLOADS["transformer"].sizes["batch"],
        sum_s_per_byte=_least_s(lambda: total.add_(one), 3) / _BYTES,
        apply_s_per_byte=_least_s(adamw.step, 3) / _BYTES,
        message_s=_message_s(),
    )


def _gradients(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    torch.autograd.grad(loss(), list(model.parameters()))


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _least_s(work: Callable[[], object], count: int) -> float:
    work()
    best_s = float("inf")
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        for _ in range(count):
            work()
        best_s = min(best_s, (time.perf_counter() - start_s) / count)
    return best_s


def _message_s() -> float:
    here, there = socket.socketpair()

    def answer() -> None:
        while received := there.recv(64):
            there.sendall(received)

    echo = threading.Thread(target=answer)
    echo.start()
    try:

        def exchange() -> None:
            here.sendall(b"push")
            here.recv(64)

        return _least_s(exchange, 1000) / 2
    finally:
        here.close()
        echo.join()
        there.close()
