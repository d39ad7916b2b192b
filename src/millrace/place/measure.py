"""What a device reaches, by class of operators. Run as a module it measures a CPU worker, in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from millrace.child_process import end_with
from millrace.place.cluster import ATTENTION, CONVOLUTION, MEMORY, PRODUCT, SPECIAL

_CHAIN = 200  # tiny operators in the module that dispatch is measured with
_ROWS, _COLUMNS = 2048, 1024  # of what elementwise operators are measured with: 8 MiB, as activations are


def measure_device(device: str, budget_s: float) -> dict[str, float]:
    """Rates by class and precision, and "dispatch_s", of "cpu" or "cuda:0" in this process.

    In flop/s; for memory and special in byte/s.

    Every figure is a median of the runs that fit in its share of `budget_s`, of which there are at least three, or one
    that is longer than its share: some processors take seconds for a product in bfloat16.
    """
    measured: dict[str, float] = {}
    share_s = budget_s / 10
    with torch.no_grad():
        measured["dispatch_s"] = _median_s(_tiny_operators(device), device, share_s) / _CHAIN
        measured[MEMORY] = _memory_rate(device, share_s)
        measured[SPECIAL] = _special_rate(device, share_s)
    for dtype in (torch.float32, torch.bfloat16):
        suffix = "" if dtype == torch.float32 else ".bfloat16"
        measured[PRODUCT + suffix] = _product_rate(device, dtype, share_s / 2)
        # Few channels leave units without work: the mean of few and many.
        found = [_convolution(device, dtype, channels, share_s / 2) for channels in (32, 64)]
        measured[CONVOLUTION + suffix] = statistics.harmonic_mean(found)
        measured[ATTENTION + suffix] = _attention(device, dtype, share_s)
    return measured


def _median_s(run: Callable[[], object], device: str, budget_s: float) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    run()
    synchronize()
    end = time.perf_counter() + budget_s
    taken: list[float] = []
    while not taken or (len(taken) < 3 and taken[0] < budget_s) or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _tiny_operators(device: str) -> Callable[[], object]:
    """A module of operators on one element, run as an eager graph is."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(_CHAIN):
        value = graph.call_function(torch.ops.aten.neg.default, (value,))
    graph.output(value)
    module, x = fx.GraphModule({}, graph), torch.ones(1, device=device)
    return lambda: module(x)


def _memory_rate(device: str, budget_s: float) -> float:
    """Of the operators between products: their results are new tensors, in memory that was used before."""
    a, b = (torch.randn(_ROWS, _COLUMNS, device=device) for _ in range(2))

    def run() -> None:
        torch.add(a, b)
        torch.mul(a, b)
        a.clone()
        F.layer_norm(a, (_COLUMNS,))

    return (3 + 3 + 2 + 2) * a.nbytes / _median_s(run, device, budget_s)


def _special_rate(device: str, budget_s: float) -> float:
    a = torch.randn(_ROWS, _COLUMNS, device=device)

    def run() -> None:
        F.gelu(a, approximate="tanh")
        torch.softmax(a, -1)
        torch.tanh(a)

    return 3 * 2 * a.nbytes / _median_s(run, device, budget_s)


def _product_rate(device: str, dtype: torch.dtype, budget_s: float) -> float:
    """The mean of a small and a large product. budget_s: for each; one that is longer tells the rate by itself."""
    rates: list[float] = []
    for n in (512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with torch.no_grad():
            taken_s = _median_s(partial(torch.matmul, a, b), device, budget_s)
        rates.append(2 * n**3 / taken_s)
        if taken_s > budget_s:
            break
    return statistics.mean(rates)


def _convolution(device: str, dtype: torch.dtype, channels: int, budget_s: float) -> float:
    """Forward and backward together: [8, channels, 28, 28] with as many filters of 3 by 3."""
    x = torch.randn(8, channels, 28, 28, device=device).to(dtype).requires_grad_()
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype).requires_grad_()
    gradient = torch.ones(8, channels, 28, 28, device=device, dtype=dtype)
    flops = 3 * 2 * 8 * 28 * 28 * channels**2 * 9
    run = lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient)  # noqa: E731
    return flops / _median_s(run, device, budget_s)


def _attention(device: str, dtype: torch.dtype, budget_s: float) -> float:
    """Forward: 4 sequences of 256 tokens, 8 heads of 64."""
    q, k, v = (torch.randn(4, 8, 256, 64, device=device).to(dtype) for _ in range(3))
    with torch.no_grad():
        taken_s = _median_s(lambda: F.scaled_dot_product_attention(q, k, v), device, budget_s)
    return 4 * 4 * 8 * 256 * 256 * 64 / taken_s


def main(arguments: list[str]) -> None:
    """THREADS BUDGET_S DESCRIPTOR PARENT: measure, write JSON to the descriptor."""
    threads, budget_s, descriptor, parent = arguments
    end_with(int(parent))
    torch.set_num_threads(int(threads))
    result: dict[str, Any] = measure_device("cpu", float(budget_s))
    with os.fdopen(int(descriptor), "w") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main(sys.argv[1:])
