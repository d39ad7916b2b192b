"""`Model`: a classifier of images in five lines, from a folder of pictures to predictions.

    m = Model(num_partitions=4)
    images = m.image_input(directory, rows=32, cols=32)
    hidden = m.relu_layer(images, 2000)
    out = m.softmax(hidden, num_classes=10, labels=images.labels)
    m.train()

The methods describe layers, and every layer holds an ordinary torch module; training is `fit`. What comes out,
`m.module`, is an `nn.Sequential` that can be traced, fitted, exported and saved like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.data.images import image_folder, read_image
from millrace.data.randomness import derived_seed, seeded_global_random
from millrace.data.sources import as_batches
from millrace.data.split import Split, holdout
from millrace.errors import DataError, SettingError
from millrace.optim.constructors import adam
from millrace.train.evaluation import Evaluator, only
from millrace.train.fit import fit
from millrace.train.layers import (
    ImageInput,
    Labels,
    Layer,
    checked_whole,
    path_to,
    relabelled,
    sequence,
    shape_after,
)
from millrace.train.metrics import accuracy
from millrace.train.result import Result

EPOCHS = 10  # of `train`, unless told otherwise
_FILES_AT_A_TIME = 256


@dataclass(frozen=True)
class Prediction:
    """What a picture shows, and how sure the model is of it."""

    file: Path
    label: str
    probability: float


class Model:
    """A classifier of images, described layer by layer.

    Args:
        num_partitions: into how many blocks to divide each wide layer (of 64 units or channels and more) for training,
            forward, backward and update alike. The blocks are nodes of one graph, which runs in this process, or on
            the devices of `train(devices=…)`.
        seed: of the initial weights (each layer's follow from its name), of what is held out, and of training.
    """

    def __init__(self, num_partitions: int = 1, *, seed: int = 0) -> None:
        self.num_partitions = checked_whole("num_partitions", num_partitions)
        self.seed = seed
        self._layers: dict[str, Layer] = {}
        self._input: ImageInput | None = None
        self._output: Layer | None = None
        self._module = nn.Sequential()

    # -- describing ----------------------------------------------------------------------------------------------

    def image_input(
        self,
        directory: str | Path,
        rows: int | None = None,
        cols: int | None = None,
        channels: int | None = None,
        *,
        held_out: float = 0.2,
        name: str = "images",
    ) -> ImageInput:
        """Read `directory/<label>/*.png` (jpg, …) into memory, as the model's input.

        Args:
            directory: holds one folder per label.
            rows, cols: size in pixels that every picture is scaled to; without them all must be of one size.
            channels: 1 (grey), 3 (colour) or 4; without it, 1 if all pictures are grey, else 3.
            held_out: fraction of each label's pictures that training never sees, for `evaluate`; 0 holds none out.

        Raises: DataError when the folder has no pictures, a damaged one or only one label, or is too small to split.
        """
        if self._input is not None:
            raise SettingError(f"{name}: the model already has the input {self._input.name!r}; it takes one")
        folder = image_folder(directory, rows, cols, channels)
        count = len(folder)
        split = Split(torch.arange(count), torch.arange(0))
        if held_out != 0:
            split = holdout(count, held_out, self.seed, folder.labels)
        labels = Labels(tuple(folder.classes), folder.labels)
        shape = tuple(folder.images.shape[1:])
        found = ImageInput(name, shape, nn.Identity(), None, Path(directory), labels, folder.images, split)
        self._add(found)
        self._input = found
        return found

    def relu_layer(self, source: Layer, units: int, *, name: str | None = None) -> Layer:
        """`units` weighted sums of everything in `source`, each cut off below zero."""
        return self._linear("relu_layer", source, units, name, relu=nn.ReLU())

    def linear(self, source: Layer, units: int, *, name: str | None = None) -> Layer:
        """`units` weighted sums of everything in `source`."""
        return self._linear("linear", source, units, name)

    def convolution(self, source: Layer, channels: int, size: int = 3, *, name: str | None = None) -> Layer:
        """`channels` filters of `size` × `size` pixels over all positions of an image, cut off below zero."""
        planes = self._image_shape("convolution", source)[0]
        channels, size = checked_whole("convolution: channels", channels), checked_whole("convolution: size", size)

        def build() -> nn.Module:
            return sequence(convolution=nn.Conv2d(planes, channels, size, padding="same"), relu=nn.ReLU())

        return self._build("convolution", source, build, name)

    def max_pool(self, source: Layer, size: int = 2, *, name: str | None = None) -> Layer:
        """The largest value of each `size` × `size` patch of an image."""
        self._image_shape("max_pool", source)
        size = checked_whole("max_pool: size", size)
        return self._build("max_pool", source, lambda: nn.MaxPool2d(size), name)

    def dropout(self, source: Layer, probability: float = 0.5, *, name: str | None = None) -> Layer:
        """Zero each value with this probability, while training."""
        if not 0 <= probability < 1:
            raise SettingError(f"dropout: probability={probability!r}: expected a number from 0 up to but not 1")
        return self._build("dropout", source, lambda: nn.Dropout(probability), name)

    def layer(self, source: Layer, module: nn.Module, *, name: str | None = None) -> Layer:
        """Any torch module of one tensor as a layer; it is used as it is, with its own initial weights."""
        return self._build(type(module).__name__.lower(), source, lambda: module, name)

    def softmax(
        self, source: Layer, num_classes: int | None = None, labels: Labels | None = None, *, name: str | None = None
    ) -> Layer:
        """One probability per class: the model's output, which completes it.

        The layer itself gives logits; the loss and `predict` turn them into probabilities.

        Args:
            num_classes: how many labels there are; counted when left out.
            labels: what the pictures show: the input's `labels`.
        """
        self._check_source("softmax", source)
        if self._output is not None:
            raise SettingError(f"softmax: the model already has the output {self._output.name!r}; it takes one")
        assert self._input is not None  # every layer stands on it
        if labels is not self._input.labels:
            what = "it was given none" if labels is None else "it was given something else"
            raise SettingError(
                f"softmax learns from the labels of the model's pictures, but {what}: labels=images.labels"
            )
        classes = self._input.labels.classes
        if num_classes is not None and num_classes != len(classes):
            shown = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
            raise SettingError(
                f"softmax: num_classes={num_classes!r}, but {self._input.directory} has {len(classes)} labels "
                f"({shown}). Make them equal, or leave num_classes out."
            )
        self._output = self._linear("softmax", source, len(classes), name)
        self._module = sequence(**{part.name: part.module for part in path_to(self._output)})
        return self._output

    # -- using ---------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Sequential:
        """Pictures [n, channels, rows, cols] → logits [n, classes], as an ordinary module."""
        return self._complete()[0]

    @property
    def description(self) -> dict[str, Any]:
        """The model in JSON values, as the configuration of a run keeps it."""
        layers = [{"name": x.name, "shape": list(x.shape), "parameters": x.parameters} for x in self._used()]
        classes = list(self._input.labels.classes) if self._input is not None else []
        return {"num_partitions": self.num_partitions, "seed": self.seed, "layers": layers, "classes": classes}

    def train(self, epochs: int | None = None, **settings: Any) -> Result:
        """Fit the model to the pictures that are not held out, and evaluate it on those that are.

        Adam at a rate of 1e-3 on batches of 32, for 10 epochs unless `epochs` or `steps` says otherwise. Called again,
        it goes on from the weights there are.

        Args:
            settings: whatever `fit` takes, such as batch_size, optimizer, compile or run_dir.
        """
        module, pictures = self._complete()
        if epochs is None and settings.get("steps") is None:
            epochs = EPOCHS
        options: dict[str, Any] = {
            "loss": cross_entropy,
            "optimizer": adam(1e-3),
            "validation": self._examples(pictures.split.held_out) if len(pictures.split.held_out) else None,
            "seed": self.seed,
            "partitions": self.num_partitions,
        }
        options |= settings | {"config": {"model": self.description} | dict(settings.get("config") or {})}
        return fit(module, self._examples(pictures.split.train), epochs=epochs, **options)

    def evaluate(self, directory: str | Path | None = None) -> dict[str, float]:
        """Loss and accuracy on the held-out pictures, or on another folder of pictures with the same labels.

        Raises: DataError when there are no such pictures, or one has a label that is not among the model's.
        """
        module, pictures = self._complete()
        if directory is not None:
            _, rows, cols = pictures.shape
            examples = relabelled(image_folder(directory, rows, cols, pictures.shape[0]), pictures.labels)
        elif len(pictures.split.held_out):
            examples = self._examples(pictures.split.held_out)
        else:
            raise DataError("No pictures were held out (held_out=0). Pass a directory to evaluate on.")
        placed = tuple(part.to(_device(module)) for part in examples)
        batches = as_batches(placed, batch_size=_FILES_AT_A_TIME, shuffle=False, drop_last=False)
        return Evaluator(module, cross_entropy, compile="eager").means(batches.one_pass())

    def predict(self, files: str | Path | Iterable[str | Path]) -> list[Prediction]:
        """What each picture file shows; a single path is taken as a list of one.

        Raises: DataError for a file that is missing or no picture.
        """
        module, pictures = self._complete()
        channels, rows, cols = pictures.shape
        paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
        probabilities = Evaluator(module, lambda m, images: m(images).softmax(-1), compile="eager")
        found: list[Prediction] = []
        for start in range(0, len(paths), _FILES_AT_A_TIME):
            some = paths[start : start + _FILES_AT_A_TIME]
            batch = torch.stack([read_image(file, rows, cols, channels) for file in some]).to(_device(module))
            best, index = only(probabilities(batch)).max(-1)
            names = [pictures.labels.classes[i] for i in index.tolist()]
            found += map(Prediction, some, names, best.tolist())
        return found

    def __repr__(self) -> str:
        rows = [
            f"  {x.name:<16} {' x '.join(map(str, x.shape)):<14} "
            + (f"{x.parameters:,} parameters" if x.parameters else "")
            for x in self._used()
        ]
        return "\n".join([f"Model(num_partitions={self.num_partitions})", *(row.rstrip() for row in rows)])

    # -- inside --------------------------------------------------------------------------------------------------

    def _linear(self, kind: str, source: Layer, units: int, name: str | None, **after: nn.Module) -> Layer:
        self._check_source(kind, source)
        units = checked_whole(f"{kind}: units", units)
        flat = {"flatten": nn.Flatten()} if len(source.shape) > 1 else {}
        inputs = torch.Size(source.shape).numel()
        return self._build(kind, source, lambda: sequence(**flat, linear=nn.Linear(inputs, units), **after), name)

    def _build(self, kind: str, source: Layer, build: Callable[[], nn.Module], name: str | None) -> Layer:
        self._check_source(kind, source)
        name = name or self._unused(kind)
        with seeded_global_random(derived_seed("layer", self.seed, name)):
            module = build()
        return self._add(Layer(name, shape_after(name, source, module), module, source))

    def _add(self, layer: Layer) -> Layer:
        if layer.name in self._layers:
            raise SettingError(f"name={layer.name!r}: the model already has a layer of this name")
        if not layer.name.isidentifier() or hasattr(nn.Sequential, layer.name):
            raise SettingError(
                f"name={layer.name!r}: expected a word, to be an attribute of the module. Choose another"
            )
        self._layers[layer.name] = layer
        return layer

    def _unused(self, kind: str) -> str:
        number = 2
        name = kind
        while name in self._layers:
            name, number = f"{kind}_{number}", number + 1
        return name

    def _check_source(self, kind: str, source: object) -> None:
        if isinstance(source, Layer) and self._layers.get(source.name) is source:
            return
        if not isinstance(source, Layer):
            what = f"got {type(source).__name__}"
        else:
            what = f"{source.name!r} is of another model"
        raise SettingError(
            f"{kind} stands on a layer of this model, but {what}. Begin with images = m.image_input(directory, …) and "
            f"pass on what each call returns: m.{kind}(images, …)."
        )

    def _image_shape(self, kind: str, source: Layer) -> tuple[int, ...]:
        self._check_source(kind, source)
        if len(source.shape) != 3:
            raise SettingError(
                f"{kind} needs an image [channels, rows, cols], but {source.name!r} gives {list(source.shape)}. Put it "
                "before the first linear or relu_layer."
            )
        return source.shape

    def _complete(self) -> tuple[nn.Sequential, ImageInput]:
        if self._output is None or self._input is None:
            raise SettingError("the model has no output yet: end it with m.softmax(layer, labels=images.labels)")
        return self._module, self._input

    def _used(self) -> list[Layer]:
        """The layers that lead to the output, or all of them as long as there is none."""
        if self._output is None or self._input is None:
            return list(self._layers.values())
        return [self._input, *path_to(self._output)]

    def _examples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        _, pictures = self._complete()
        return pictures.images[index], pictures.labels.indices[index]


def cross_entropy(module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the accuracy of a model on a batch of (images, label indices), as `fit` takes them."""
    images, labels = batch
    logits = module(images)
    return F.cross_entropy(logits, labels), {"accuracy": accuracy(logits, labels)}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
