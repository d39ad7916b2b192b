"""A table of embeddings that lives on the CPU, and the dense part of the model on a GPU: some wishes, no other change.

In each step the rows of the words go to the GPU and their gradients come back, however large the table is; SGD updates
only those rows. Without a GPU the two parts train in two CPU workers, to show the same thing.

Run: python examples/embedding_on_the_cpu.py
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.place.hints import Hints

WORDS, WIDTH, LENGTH = 200_000, 64, 16
COMMON = 300  # words that most texts are made of


class Reader(nn.Module):
    """Whether a text is cheerful: the mean of its words' vectors, and three layers. [batch, LENGTH] -> [batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.dense = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, words: Tensor) -> Tensor:
        return self.dense(self.table(words).mean(1)).squeeze(-1)


def texts(count: int) -> tuple[Tensor, Tensor]:
    """Words that are drawn at random, some of them rare; a text with more even words than odd ones is cheerful."""
    words = torch.randint(COMMON, (count, LENGTH))
    words = torch.where(torch.rand(count, LENGTH) < 0.05, torch.randint(WORDS, (count, LENGTH)), words)
    return words, ((words % 2 == 0).float().mean(1) > 0.5).float()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def main(steps: int = 400, compile: str = "tiered") -> float:
    """Train; returns the accuracy on texts that were not trained on."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        devices, dense = ["cpu:0", "gpu:0"], "gpu:0"
    else:
        print("no GPU here: the dense part trains in a second CPU worker")
        devices, dense = ["cpu:0", "cpu:1"], "cpu:1"
    model = Reader()
    millrace.fit(
        model,
        [texts(256) for _ in range(steps)],
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=2.0),
        epochs=1,
        devices=devices,
        placement=Hints(modules={"table": "cpu:0", "dense": dense}, variables={"table.weight": "cpu:0"}),
        compile=compile,
        progress=False,
        run_dir=False,
    )
    words, cheerful = texts(4096)
    model.eval()
    with torch.no_grad():
        accuracy = float(((model(words) > 0) == cheerful.bool()).float().mean())
    table_bytes = model.table.weight.nbytes
    print(f"the table has {table_bytes >> 20} MiB; a step sends {256 * WIDTH * 4 >> 10} KiB each way")
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
