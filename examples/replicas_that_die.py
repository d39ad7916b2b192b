"""Train in three replicas, kill one of them now and then, and compare the weights with those of a run without faults.

Run: python examples/replicas_that_die.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import millrace


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).double().mean()}


def train(epochs: int, chaos_s: float | None) -> tuple[nn.Module, float]:
    """The model, and its accuracy on the last batches. chaos_s: kill a replica every so many seconds."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).double()
    result = millrace.fit(
        model,
        (images, labels),
        loss=loss,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        batch_size=256,
        epochs=epochs,
        replicas=3,
        chaos_s=chaos_s,
        compile="eager",
        run_dir=False,
    )
    return model, result.values["accuracy"]


def main(epochs: int = 50, chaos_s: float = 1.0) -> float:
    """Both runs; returns the accuracy of the one with faults."""
    calm, _ = train(epochs, None)
    shaken, accuracy = train(epochs, chaos_s)
    pairs = zip(calm.parameters(), shaken.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"accuracy {accuracy:.3f}; the largest difference of a weight from the run without faults: {difference:.1g}")
    return accuracy


if __name__ == "__main__":
    main()
