"""Read handwritten digits: a small convolutional network on scikit-learn's real 8×8 scans.

The data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
1797 digits of 13 people, each normalized to a bitmap of 32×32 by NIST's programs; of every block of 4×4 its number of
inked pixels, 0 to 16, is one pixel here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.augment import on_images, random_affine
from millrace.data.images import read_image
from millrace.data.mapped import mapped
from millrace.data.scans import BLOCK, SIZE, scan_of
from millrace.data.sources import as_batches
from millrace.data.split import holdout
from millrace.models.classified import classified
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.train.metrics import accuracy
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting

CLASSES = 10
_SPLIT_SEED = 0  # which scans are held out never changes, whatever the run's seed


@dataclass(frozen=True)
class DigitsSettings(Settings):
    """Defaults that reach 99 % in a few seconds."""

    epochs: int | None = setting(30, "passes over the training scans", low=1, on_resume=True)
    batch_size: int = setting(64, "scans per step", low=1)
    evaluate_every: int | None = setting(100, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(100, "steps between checkpoints", low=1, on_resume=True)
    # A step of this model is a few milliseconds of work. Split over two threads on two busy cores (the compiler alone
    # keeps one busy), it took eight times as long: each of its many small pieces then waits for the slower thread.
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    width: int = setting(32, "channels of the first convolution", low=1)
    dropout: float = setting(0.3, "share of the last features left out", low=0, high=0.9)
    learning_rate: float = setting(4e-3, "at the top of the schedule", low=0)
    weight_decay: float = setting(0.05, "decoupled", low=0)
    label_smoothing: float = setting(0.05, "share of the target spread over all digits", low=0, high=0.9)
    turn: float = setting(12.0, "augmentation: degrees at most, either way", low=0, high=90)
    scale: float = setting(0.12, "augmentation: share of the size at most, either way", low=0, high=1)
    shift: float = setting(0.08, "augmentation: share of the width at most, either way", low=0, high=1)


class Digits(Task[DigitsSettings]):
    """Images [B, 1, 8, 8] from 0 to 1, labels [B]; logits [B, 10]."""

    settings_type = DigitsSettings
    metric = "accuracy"
    bar = 0.98

    def data(self, facts: Facts | None = None) -> TaskData:
        """A fifth of the scans is for the test; of the others a tenth is for validation."""
        scans = require("sklearn.datasets", extra="zoo", package="scikit-learn").load_digits()
        images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / BLOCK**2
        labels = torch.tensor(scans.target, dtype=torch.int64)
        rest, test = holdout(len(labels), 0.2, seed=_SPLIT_SEED, labels=labels)
        inner = holdout(len(rest), 0.1, seed=_SPLIT_SEED, labels=labels[rest])
        train, validation = rest[inner.train], rest[inner.held_out]

        s = self.settings
        affine = partial(random_affine, max_degrees=s.turn, max_scale=s.scale, max_shift=s.shift)
        batches = as_batches((images[train], labels[train]), batch_size=s.batch_size, seed=s.seed)
        return TaskData(
            mapped(batches, on_images(affine), seed=s.seed),
            as_batches((images[validation], labels[validation]), batch_size=len(validation), shuffle=False),
            as_batches((images[test], labels[test]), batch_size=len(test), shuffle=False),
        )

    def model(self, facts: Facts) -> nn.Module:
        """Three convolutions, two halvings, one linear layer."""
        width = self.settings.width
        layers = {
            "block1": _block(1, width),
            "block2": _block(width, 2 * width),
            "halved": nn.MaxPool2d(2),
            "block3": _block(2 * width, 2 * width),
            "halved_again": nn.MaxPool2d(2),
            "flat": nn.Flatten(),
            "dropout": nn.Dropout(self.settings.dropout),
            "readout": nn.Linear(2 * width * (SIZE // 4) ** 2, CLASSES),
        }
        return nn.Sequential(OrderedDict(layers))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; targets are smoothed in training only."""
        images, labels = batch
        logits = model(images)
        smoothing = self.settings.label_smoothing if model.training else 0.0
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss, {"accuracy": accuracy(logits, labels)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW; the rate climbs over a fifth of the run and falls along a cosine."""
        s = self.settings
        rate = warmup_cosine(s.learning_rate, steps, warmup=steps // 5)
        return adamw(rate, weight_decay=s.weight_decay)

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Which digits of the test scans were taken for which."""
        found = classified(model, data.test)
        mistakes = found.mistakes()
        listed = ", ".join(f"a {is_} read as {said} ({n}×)" for (is_, said), n in mistakes.most_common())
        return f"misread {mistakes.total()} of {len(found.labels)} test scans" + (f": {listed}" if listed else "")

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """The digit in a picture of any size, dark on light or light on dark."""
        scan = scan_of(read_image(file, channels=4), file)
        with torch.no_grad():
            logits = model(scan[None].to(next(model.parameters()).device))
        probabilities = logits[0].softmax(-1).tolist()
        best = sorted(range(CLASSES), key=lambda digit: -probabilities[digit])
        runners_up = ", ".join(f"{digit}: {probabilities[digit]:.1%}" for digit in best[1:3])
        text = f"{best[0]} ({probabilities[best[0]]:.1%}; then {runners_up})"
        return Prediction(text, {"digit": best[0], "probabilities": probabilities})


def _block(inputs: int, outputs: int) -> nn.Module:
    layers = {
        "convolution": nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        "norm": nn.BatchNorm2d(outputs),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


TASK = Digits
