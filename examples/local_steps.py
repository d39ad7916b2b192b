"""Three replicas train alone for ten steps and then agree (DiLoCo): a tenth of the traffic, and how much is lost by it.

Run: python examples/local_steps.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import millrace
from millrace.replicas.settings import LocalSteps


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def train(update: str | LocalSteps, steps: int) -> float:
    """The share of right answers on digits that were not trained on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    result = millrace.fit(
        model,
        (images[300:], labels[300:]),
        loss=loss,
        optimizer=millrace.optim.adamw(1e-3),
        batch_size=96,
        steps=steps,
        validation=(images[:300], labels[:300]),
        evaluate_every=steps,
        replicas=3,
        update=update,
        compile="eager",
        run_dir=False,
    )
    return result.evaluation["accuracy"]


def main(steps: int = 400) -> tuple[float, float]:
    """Accuracy when they agree after every step, and after every tenth."""
    every, tenth = train("sync", steps), train(LocalSteps(every=10), steps)
    print(f"accuracy {every:.3f} agreeing after every step, {tenth:.3f} after every tenth")
    return every, tenth


if __name__ == "__main__":
    main()
