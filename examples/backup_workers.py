"""Three replicas and one more than an update needs: each takes the first three gradients, and waits for no straggler.

Run: python examples/backup_workers.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import millrace


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def main(epochs: int = 12) -> float:
    """The share of right answers on digits that were not trained on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )
    result = millrace.fit(
        model,
        (images[300:], labels[300:]),
        loss=loss,
        optimizer=millrace.optim.adam(2e-3),
        batch_size=128,
        epochs=epochs,
        validation=(images[:300], labels[:300]),
        replicas=3,
        parameter_servers=2,
        backup=1,
        compile="eager",
        run_dir=False,
    )
    accuracy = result.evaluation["accuracy"]
    print(
        f"accuracy {accuracy:.3f} after {result.steps} steps; {result.dropped} gradients came too late and were dropped"
    )
    return accuracy


if __name__ == "__main__":
    main()
