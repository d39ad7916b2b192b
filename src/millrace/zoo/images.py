"""Name what a picture shows, with Inception-style or residual networks: photographs, or a folder of one's own.

Without pictures of one's own: patches of twenty photographs, each a class (`millrace.data.photographs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.augment import compose, on_images, random_colour, random_flip, random_resized_crop
from millrace.data.contact_sheet import contact_sheet
from millrace.data.labelled_pictures import Labelled, first_of_each, of_classes, split_pictures
from millrace.data.mapped import mapped
from millrace.data.photographs import PATCH, patches, read_photographs
from millrace.data.sources import as_batches
from millrace.data.views import SEEN, middle, views
from millrace.models.classified import classified
from millrace.models.image_networks import inception, residual
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Group, Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.train.metrics import accuracy, top_accuracy
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting
from millrace.zoo.transfer import take_over, trained_alone

NETWORKS: dict[str, Callable[..., nn.Module]] = {"inception": inception, "residual": residual}
PER_CLASS = {"train": 120, "validation": 16, "test": 40}  # patches of every photograph
_SHOWN = 48  # pictures on the contact sheet


@dataclass(frozen=True)
class ImagesSettings(Settings):
    """Defaults that name four of five unseen patches after some minutes on one core."""

    steps: int | None = setting(600, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(48, "pictures per step", low=1)
    evaluate_every: int | None = setting(100, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(100, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting("", "a folder with a subfolder of pictures for each class, or a Hugging Face data set")
    size: int = setting(32, "pixels of a side of what the network sees", low=8, high=1024)
    network: Literal["inception", "residual"] = setting("inception", "what the blocks are made of")
    width: int = setting(32, "channels after the stem; twice and four times as many later", low=4)
    blocks: int = setting(2, "in each of the three stages", low=1)
    stride: int = setting(
        2, "of the stem; with 1 the network sees finer detail and takes four times as long", low=1, high=2
    )
    dropout: float = setting(0.2, "share of the last features left out", low=0, high=0.9)
    learning_rate: float = setting(4e-3, "at the top of the schedule", low=0)
    weight_decay: float = setting(0.05, "decoupled", low=0)
    label_smoothing: float = setting(0.1, "share of the target spread over all classes", low=0, high=0.9)
    average: float | None = setting(0.99, "decay of the weights' running average, which is what is used", low=0, high=1)
    least_area: float = setting(0.4, "augmentation: of a picture, in every crop", low=0.01, high=1)
    flip: bool = setting(True, "augmentation: mirror half of the pictures")
    colour: float = setting(0.4, "augmentation: of brightness, contrast and saturation, either way", low=0, high=2)
    classes: Literal["all", "half", "rest"] = setting("all", "every class, every second one, or the others")
    examples: int | None = setting(None, "training pictures of each class; none takes all", low=1)
    transfer_from: str = setting("", "a run whose features to begin with, such as one of the other classes")
    body_rate: float = setting(0.3, "of a transferred network's features, against its readout's rate", low=0, high=1)
    compare: bool = setting(True, "after transfer, also train from scratch on the same pictures, for the report")


class Images(Task[ImagesSettings]):
    """Pictures [B, 3, size, size] from 0 to 1, labels [B]; logits [B, classes]."""

    settings_type = ImagesSettings
    metric = "accuracy"
    bar = 0.78  # the first run with these defaults reached 0.819; its 800 test patches are from 360 tiles

    def data(self, facts: Facts | None = None) -> TaskData:
        """Patches of photographs, or one's own pictures: a fifth for the test, of the others a tenth for validation."""
        s = self.settings
        parts, names = split_pictures(s.data, round(s.size / SEEN)) if s.data else _photographs()
        kept = {"all": range(len(names)), "half": range(0, len(names), 2), "rest": range(1, len(names), 2)}[s.classes]
        train, validation, test = (of_classes(part, list(kept)) for part in parts)
        train = train if s.examples is None else first_of_each(train, s.examples)
        crop = partial(random_resized_crop, rows=s.size, cols=s.size, least_area=s.least_area)
        colour = partial(random_colour, max_brightness=s.colour, max_contrast=s.colour, max_saturation=s.colour)
        augment = compose(crop, *([random_flip] if s.flip else []), *([colour] if s.colour else []))
        batches = as_batches(train, batch_size=min(s.batch_size, len(train[1])), seed=s.seed)

        def held_out(part: Labelled) -> Labelled:
            return middle(part[0], s.size), part[1]

        return TaskData(
            mapped(batches, on_images(augment), seed=s.seed, evaluation=held_out),
            as_batches(held_out(validation), batch_size=64, shuffle=False, drop_last=False),
            as_batches(held_out(test), batch_size=64, shuffle=False, drop_last=False),
            facts={"classes": [names[index] for index in kept], "patches": not s.data},
        )

    def model(self, facts: Facts) -> nn.Module:
        """The network that `network` names."""
        s = self.settings
        return NETWORKS[s.network](len(_names(facts)), s.width, s.blocks, s.dropout, s.stride)

    def warm_start(self, model: nn.Module) -> None:
        """All but the readout of the run that `transfer_from` names, as it would predict: averaged."""
        if self.settings.transfer_from:
            take_over(model, self.settings.transfer_from, alike="network, width, blocks and stride")

    def loss(self, model: nn.Module, batch: Labelled) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; targets are smoothed in training only."""
        images, labels = batch
        logits = model(images)
        smoothing = self.settings.label_smoothing if model.training else 0.0
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss, {"accuracy": accuracy(logits, labels), "top5": top_accuracy(logits, labels, 5)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW along a cosine, after a climb over a tenth of the run, with averages of the weights."""
        s = self.settings
        rate = warmup_cosine(s.learning_rate, steps, warmup=steps // 10)
        groups = (Group("readout.*"), Group("*", scale=s.body_rate)) if s.transfer_from else ()
        return replace(adamw(rate, weight_decay=s.weight_decay, groups=groups), average=s.average)

    def report(self, model: nn.Module, data: TaskData) -> str:
        """What was taken for what; after transfer, how good the same network is from scratch."""
        names = _names(data.facts)
        found = classified(model, data.test)
        mistakes = found.mistakes()
        listed = ", ".join(f"{names[a]} for {names[b]} ({n}×)" for (a, b), n in mistakes.most_common(5))
        text = f"took {mistakes.total()} of {len(found.labels)} for others" + (f": {listed}" if listed else "")
        if self.settings.transfer_from and self.settings.compare:
            alone = Images(replace(self.settings, transfer_from=""))
            scratch = trained_alone(alone, data.facts, str(next(model.parameters()).device))
            text += "\nfrom scratch on the same pictures: "
            text += f"accuracy {scratch['accuracy']:.4f}, top5 {scratch['top5']:.4f}"
        return text

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """A contact sheet of test pictures with what was said; of those in red, also what they are."""
        names = _names(data.facts)
        found = classified(model, data.test)
        images, labels, said = found.inputs, found.labels, found.said
        chosen = torch.linspace(0, len(labels) - 1, min(_SHOWN, len(labels))).round().long()
        captions = [
            names[said[i]] if labels[i] == said[i] else f"{names[said[i]]} ({names[labels[i]]})" for i in chosen
        ]
        right, zoom = (said == labels)[chosen].tolist(), max(1, 96 // images.shape[-1])
        return {"test": contact_sheet(images[chosen], captions, right, zoom=zoom)}

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """The five likeliest classes; of a photograph larger than a patch, in the mean over its patches."""
        shown = views(file, self.settings.size, PATCH if facts["patches"] else None)
        device = next(model.parameters()).device
        with torch.no_grad():
            probabilities = model(shown.to(device)).softmax(-1).mean(0).cpu()
        names = _names(facts)
        best = probabilities.topk(min(5, len(names)))
        ranked = {names[index]: value for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        text = ", ".join(f"{name} ({probability:.1%})" for name, probability in ranked.items())
        return Prediction(text, {"class": next(iter(ranked)), "top5": dict(ranked)})


def _photographs() -> tuple[list[Labelled], list[str]]:
    """Training, validation and test patches, and the photographs' names."""
    scikit_image = require("skimage.data", extra="zoo", package="scikit-image")
    scikit_learn = require("sklearn.datasets", extra="zoo", package="scikit-learn")
    found = read_photographs(Path(scikit_image.__file__).parent, Path(scikit_learn.__file__).parent / "images")
    parts = [patches(found, part, count) for part, count in PER_CLASS.items()]
    return [(part.images, part.labels) for part in parts], list(found)


def _names(facts: Facts) -> list[str]:
    names = facts["classes"]
    assert isinstance(names, list)
    return [str(name) for name in names]


TASK = Images
