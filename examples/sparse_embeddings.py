"""A table of 262,144 rows lives on parameter servers; each replica fetches and pushes only the rows its batch names.

Which of Python's own help texts do twelve words come from? Words and pairs of words are hashed to rows, and the mean of
the rows decides.

Run: python examples/sparse_embeddings.py
"""

from __future__ import annotations

import itertools
import re
import zlib
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.replicas.settings import Async

ROWS, WORDS, BLOCK, LEAST = 2**18, 12, 60, 400


class Topics(nn.Module):
    """Scores for each topic from the rows of some words."""

    def __init__(self, count: int, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, width)
        self.scores = nn.Linear(width, count)

    def forward(self, rows: Tensor) -> Tensor:
        return self.scores(self.table(rows).mean(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def windows() -> tuple[list[str], Tensor, Tensor, Tensor]:
    """The topics; of every window its rows [N, 2 * WORDS - 1], its topic [N], and whether it is held out [N]."""
    texts = {name: re.findall("[a-z]+", text.lower()) for name, text in sorted(topics.items())}
    names = [name for name, words in texts.items() if len(words) >= LEAST]
    rows, labels, held_out = [], [], []
    for label, name in enumerate(names):
        for block, begin in enumerate(range(0, len(texts[name]), BLOCK)):
            words = texts[name][begin : begin + BLOCK]
            for start in range(len(words) - WORDS + 1):
                some = words[start : start + WORDS]
                said = [*some, *(f"{one} {next_}" for one, next_ in itertools.pairwise(some))]
                rows.append([zlib.crc32(each.encode()) % ROWS for each in said])
                labels.append(label)
                held_out.append(block % 5 == 4)
    return names, torch.tensor(rows), torch.tensor(labels), torch.tensor(held_out)


def main(epochs: int = 2) -> float:
    """The share of right answers on windows from passages that were not trained on."""
    names, rows, labels, held_out = windows()
    torch.manual_seed(0)
    result = millrace.fit(
        Topics(len(names)),
        (rows[~held_out], labels[~held_out]),
        loss=loss,
        optimizer=millrace.optim.adagrad(0.1),
        batch_size=64,
        epochs=epochs,
        validation=(rows[held_out], labels[held_out]),
        replicas=2,
        update=Async(parameter_servers=2),
        compile="eager",
        run_dir=False,
    )
    accuracy = result.evaluation["accuracy"]
    by_chance = labels[held_out].bincount().max().item() / held_out.sum().item()
    print(f"accuracy {accuracy:.3f} over {len(names)} topics, the most frequent of which makes up {by_chance:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
