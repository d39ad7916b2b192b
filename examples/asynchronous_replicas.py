"""Four replicas push gradients to two parameter servers without waiting for each other, and are killed now and then.

The model tells the next letter from eight, in the English of Python's own help texts.

Run: python examples/asynchronous_replicas.py
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.replicas.settings import Async

CONTEXT = 8
LETTERS = " abcdefghijklmnopqrstuvwxyz"


def examples() -> tuple[Tensor, Tensor]:
    """Eight characters [N, 8], and the one that follows [N]."""
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    codes = torch.tensor([LETTERS.index(letter) for letter in text])
    windows = codes.unfold(0, CONTEXT + 1, 1)
    return windows[:, :CONTEXT], windows[:, CONTEXT]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    nats = F.cross_entropy(model(batch[0]), batch[1])
    return nats, {"bits": nats / torch.log(torch.tensor(2.0))}


def main(steps: int = 1200, chaos_s: float = 2.0) -> float:
    """Bits per character at the end."""
    torch.manual_seed(0)
    letters = len(LETTERS)
    model = nn.Sequential(
        nn.Embedding(letters, 32), nn.Flatten(), nn.Linear(CONTEXT * 32, 256), nn.ReLU(), nn.Linear(256, letters)
    )
    result = millrace.fit(
        model,
        examples(),
        loss=loss,
        optimizer=millrace.optim.adagrad(0.03),  # forgives gradients that come late
        batch_size=256,
        steps=steps,
        replicas=4,
        update=Async(parameter_servers=2),
        chaos_s=chaos_s,
        compile="eager",
        run_dir=False,
    )
    bits = result.values["bits"]
    print(f"{bits:.2f} bits per character (by chance {torch.log2(torch.tensor(float(letters))):.2f})")
    print(f"between fetch and update came {result.mean_staleness:.1f} others; {result.repeats} batches were done twice")
    return bits


if __name__ == "__main__":
    main()
