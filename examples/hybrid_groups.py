"""Two groups of two replicas: equal inside a group, and no group waits for the other.

The replicas of a group divide every batch and add up their gradients; the group then pushes them to a parameter server.

Run: python examples/hybrid_groups.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import millrace
from millrace.replicas.settings import Hybrid


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def main(epochs: int = 12) -> float:
    """The share of right answers on digits that were not trained on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    result = millrace.fit(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)),
        (images[300:], labels[300:]),
        loss=loss,
        optimizer=millrace.optim.adagrad(0.02),
        batch_size=64,
        epochs=epochs,
        validation=(images[:300], labels[:300]),
        replicas=2,
        update=Hybrid(groups=2),
        compile="eager",
        run_dir=False,
    )
    accuracy = result.evaluation["accuracy"]
    print(f"accuracy {accuracy:.3f}; between a group's fetch and its update came {result.mean_staleness:.1f} others")
    return accuracy


if __name__ == "__main__":
    main()
