"""What narrowing tensors saves and costs: `python -m bench.wire`.

The tensors are real: a network with ReLU is trained on scikit-learn's handwritten digits, and its hidden activations,
before and after ReLU, and the gradient for them are encoded and decoded as the edges between devices do. A plain copy
takes turns with them. Prints a JSON line per codec, tensor and size: the share of the bytes that is left, microseconds
per MB of the tensor (the least of all rounds), how many copies encoding and decoding take together, and below which
speed of a link the bytes saved are worth that time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from millrace.compile.heap import keep_freed_memory
from millrace.place.wire import CODECS
from millrace.runtime.transport.codecs import decode, encode

WIDTH = 1024
SIZES_BYTES = (16_384, 65_536, 1_048_576, 6_291_456)
STEPS = 100
TURN_S = 0.02  # about how long one turn lasts


def hidden_tensors() -> dict[str, Tensor]:
    """Of a trained network and all 1,797 digits: the second hidden layer before and after ReLU, and its gradient."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    first, second, last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
    model = nn.ModuleList([first, second, last])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forward(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = second(first(batch).relu())
        after = before.relu()
        return before, after, last(after)

    for _ in range(STEPS):
        picked = torch.randint(len(images), (256,))
        loss = F.cross_entropy(forward(images[picked])[2], labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after, scores = forward(images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels), before)
    return {"activation": before.detach(), "after ReLU": after.detach(), "gradient": gradient}


def best_seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least time of each, which take turns."""
    counts = {name: max(1, round(TURN_S / _seconds(work, 3))) for name, work in works.items()}
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            best[name] = min(best[name], _seconds(work, counts[name]))
    return best


def _seconds(work: Callable[[], object], count: int) -> float:
    work()
    start_s = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start_s) / count


def figures(name: str, tensor: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A figure for each codec."""
    out, works = torch.empty_like(tensor), dict[str, Callable[[], object]]()
    codes = {codec: encode(codec, tensor).clone() for codec in CODECS}
    works["copy"] = lambda: out.copy_(tensor)
    for codec, code in codes.items():
        works[f"encode {codec}"] = lambda codec=codec: encode(codec, tensor)
        works[f"decode {codec}"] = lambda codec=codec, code=code: decode(codec, code, out)
    seconds = best_seconds(works, rounds)

    def per_mb(work: str) -> float:
        return round(seconds[work] * 1e6 / (tensor.nbytes / 1e6), 1)

    found = []
    for codec, code in codes.items():
        saved_bytes = tensor.nbytes - code.nbytes
        spent_s = seconds[f"encode {codec}"] + seconds[f"decode {codec}"]
        found.append(
            {
                "name": f"wire/{codec}/{name}/{tensor.nbytes}",
                "share_of_bytes": round(code.nbytes / tensor.nbytes, 3),
                "encode_us_per_mb": per_mb(f"encode {codec}"),
                "decode_us_per_mb": per_mb(f"decode {codec}"),
                "copy_us_per_mb": per_mb("copy"),
                "times_copy": round(spent_s / seconds["copy"], 1),
                "pays_below_gb_per_s": round(saved_bytes / spent_s / 1e9, 2),
                "rounds": rounds,
            }
        )
    return found


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_BYTES, help=f"bytes, multiples of {4 * WIDTH}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    for name, whole in hidden_tensors().items():
        for size_bytes in asked.sizes:
            rows = min(size_bytes // (4 * WIDTH), len(whole))
            for figure in figures(name, whole[:rows].clone(), asked.rounds):
                print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
