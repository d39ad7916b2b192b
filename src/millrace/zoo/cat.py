"""Find a unit that knows faces (or a cat), in features that were learned without labels.

Q. V. Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012: a sparse, locally
connected, pooled autoencoder sees pictures without labels; then, with some labels, its unit is looked for that tells
a class best, and with others, that unit is measured.

The data: 100 faces of 25×25 pixels (scikit-image's part of Labeled Faces in the Wild) and crops of photographs that
come with scikit-image and scikit-learn. Half of the faces, and the left parts of the photographs, are for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from millrace.data.augment import random_flip
from millrace.data.batches import Batches
from millrace.data.class_pictures import ClassPictures, cat_pictures, face_pictures, in_parts, own_pictures
from millrace.data.contact_sheet import contact_sheet
from millrace.data.crops import standardized, visible
from millrace.data.images import read_image
from millrace.data.mapped import mapped
from millrace.data.randomness import generator_from
from millrace.data.sources import as_batches
from millrace.data.split import holdout
from millrace.models.detectors import Detector, best_detector, measured_detector
from millrace.models.local_features import LocalFeatures, Shape, units_of
from millrace.models.stimulus import smooth_stimulus
from millrace.optim.constructors import adam
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import Cosine
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting

SIDE = 25  # pixels: the size of the faces
# No people: the others' crops must not show what is looked for.
_PHOTOS = ("chelsea", "coffee", "rocket", "coins", "brick", "grass", "gravel", "moon", "stereo_motorcycle")
_PHOTOS_TOO = ("china.jpg", "flower.jpg")  # of scikit-learn


@dataclass(frozen=True)
class CatSettings(Settings):
    """Defaults that find a unit for faces in some minutes on one core."""

    steps: int | None = setting(1500, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(64, "pictures per step", low=1)
    evaluate_every: int | None = setting(250, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(250, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting("", "faces, chelsea (a cat), a folder with a subfolder per class, or a Hugging Face dataset")
    target: str = setting("", "the class to find a unit for, in data of one's own; the first by name if empty")
    crops: int = setting(6000, "of photographs, to learn from beside the class", low=11)
    share: float = setting(
        0.3, "of the pictures to learn from that show the class, as they are repeated", low=0, high=0.9
    )
    maps: int = setting(8, "filters at every place of the first stage", low=1)
    units: int = setting(64, "of the last stage, which sees everything", low=1)
    sparsity: float = setting(1.0, "weight of the activity beside the reconstruction error", low=0)
    learning_rate: float = setting(3e-3, "at the start; it falls along a cosine", low=0)


class Cat(Task[CatSettings]):
    """Training: pictures [B, 1, 25, 25]. Test: {"images", "belongs", "seen"}; the unit is chosen on those seen."""

    settings_type = CatSettings
    metric = "accuracy"
    monitor = "loss"
    bar = 0.84  # just above the best single pixel

    def data(self, facts: Facts | None = None) -> TaskData:
        """Unlabelled pictures to learn from; labelled ones of two kinds for the test: seen, and never seen."""
        s = self.settings
        found = _read(s)
        rest, held_out = holdout(len(found.background), 0.1)
        train, labelled = found.learned_from(rest, s.share), found.labelled()
        batches = as_batches(train, batch_size=min(s.batch_size, len(train)), seed=s.seed)
        return TaskData(
            mapped(batches, random_flip, seed=s.seed),
            as_batches(found.background[held_out], batch_size=len(held_out), shuffle=False),
            as_batches(labelled, batch_size=len(labelled["seen"]), shuffle=False),
            facts={"target": found.target},
        )

    def model(self, facts: Facts) -> LocalFeatures:
        """Filters of 6×6 pixels and pools of 4×4 of them; above that, units that see all of it."""
        first = Shape(window=6, stride=1, maps=self.settings.maps, pool=4, pool_stride=2)
        last = Shape(window=9, stride=1, maps=self.settings.units, pool=1)
        return LocalFeatures(1, SIDE, [first, last])

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the stages fail to reconstruct, and how active they are."""
        seen = model(batch)
        loss = torch.stack(seen.errors).sum() + self.settings.sparsity * torch.stack(seen.activities).sum()
        return loss, {f"error_{number}": error for number, error in enumerate(seen.errors, 1)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """Adam; the rate falls along a cosine."""
        return adam(Cosine(self.settings.learning_rate, steps=steps))

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Balanced accuracy (0.5 by chance) on unseen pictures, of what does best on those seen: a unit of the last
        stage, of the first, of a network that learned nothing; a pixel; a picture that was seen, as a filter."""
        seen, test = in_parts(*batches.one_pass())
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.settings.seed + 1)
            untrained = self.model({}).to(next(model.parameters()).device)

        def measured(of_seen: Tensor, of_test: Tensor, both_ways: bool = False) -> tuple[Detector, float]:
            return measured_detector(of_seen, seen.belongs, of_test, test.belongs, both_ways=both_ways)

        of_seen, of_test = units_of(model, seen.images), units_of(model, test.images)
        fresh_seen, fresh_test = (units_of(untrained, part.images)[-1] for part in (seen, test))
        known, new = seen.images.flatten(1), test.images.flatten(1)
        detector, accuracy = measured(of_seen[-1], of_test[-1])
        return {
            "accuracy": accuracy,
            "accuracy_seen": detector.chosen_at,
            "first_stage": measured(of_seen[0], of_test[0])[1],
            "untrained": measured(fresh_seen, fresh_test)[1],
            "pixel": measured(known, new, both_ways=True)[1],
            "filter": measured(known @ known.T, new @ known.T, both_ways=True)[1],
        }

    def report(self, model: nn.Module, data: TaskData) -> str:
        """The unit, and what it does better than."""
        v = self.evaluate(model, data.test)
        unit = _chosen(model, data.test).unit
        return (
            f"unit {unit} tells {data.facts['target']} from the rest: {v['accuracy']:.1%} of unseen pictures (chance "
            f"50%; best pixel {v['pixel']:.1%}, best picture as a filter {v['filter']:.1%}, a unit that learned "
            f"nothing {v['untrained']:.1%})"
        )

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """The unseen pictures that drive the unit most, and what would drive it more than any."""
        _, test = in_parts(*data.test.one_pass())
        unit = _chosen(model, data.test).unit
        values, order = units_of(model, test.images)[-1][:, unit].sort(descending=True)
        top = visible(test.images[order[:48]])
        captions, right = [f"{value:.2f}" for value in values[:48].tolist()], test.belongs[order[:48]].tolist()
        return {
            "top_stimuli": contact_sheet(top, captions, right, columns=12, zoom=3),
            "optimal_stimulus": visible(self._optimal(model, unit)[None], zoom=4)[0],
        }

    def _optimal(self, model: nn.Module, unit: int) -> Tensor:
        """[1, SIDE, SIDE], standardized; the best of eight climbs."""
        start = torch.randn(8, 1, SIDE, SIDE, generator=generator_from("stimulus", self.settings.seed))
        device = next(model.parameters()).device
        return smooth_stimulus(lambda pictures: model(pictures).units[-1].flatten(1)[:, unit], start.to(device))

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """Whether the unit takes a picture for the class; the unit is chosen anew on the seen pictures."""
        image = standardized(read_image(file, SIDE, SIDE, channels=1)[None])
        detector = _chosen(model, self.data(facts).test)
        values = units_of(model, image)[-1]
        yes, value = bool(detector.says(values)), float(values[0, detector.unit])
        text = f"{'' if yes else 'not '}{facts['target']}: unit {detector.unit} is at {value:.3f}"
        said = {"belongs": yes, "unit": detector.unit, "value": value, "threshold": detector.threshold}
        return Prediction(
            f"{text}, its threshold is {detector.threshold:.3f}", said, {"seen": visible(image, zoom=4)[0]}
        )


def _chosen(model: nn.Module, batches: Batches) -> Detector:
    """The unit of the last stage that tells the seen pictures best."""
    seen, _ = in_parts(*batches.one_pass())
    return best_detector(units_of(model, seen.images)[-1], seen.belongs)


def _read(s: CatSettings) -> ClassPictures:
    """The pictures that the settings ask for."""
    generator = generator_from("cat")  # they never change with the run's seed
    if s.data not in ("", "faces", "chelsea"):
        return own_pictures(s.data, s.target, SIDE)
    if s.data == "chelsea":
        return cat_pictures(_photos(), SIDE, s.crops, generator)
    subset = require("skimage.data", extra="zoo", package="scikit-image").lfw_subset()
    faces = torch.tensor(subset[:100], dtype=torch.float32)[:, None]  # what follows them is mostly black
    return face_pictures(faces, _photos(), s.crops, generator)


def _photos() -> list[Tensor]:
    """Grey photographs [1, rows, cols] from 0 to 1; the cat comes first."""
    ours = require("skimage.data", extra="zoo", package="scikit-image")
    theirs = require("sklearn.datasets", extra="zoo", package="scikit-learn")
    found = []
    for name in _PHOTOS + _PHOTOS_TOO:
        pixels = theirs.load_sample_image(name) if name in _PHOTOS_TOO else getattr(ours, name)()
        pixels = torch.tensor(pixels[0] if isinstance(pixels, tuple) else pixels, dtype=torch.float32) / 255
        found.append(pixels[None] if pixels.ndim == 2 else pixels.mean(-1)[None])
    return found


TASK = Cat
