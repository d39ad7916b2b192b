"""What a `Model` is described with: layers, each with a torch module inside, from the pictures to the output."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from millrace.data.images import ImageFolder
from millrace.data.split import Split
from millrace.errors import DataError, SettingError


@dataclass(frozen=True, eq=False)
class Labels:
    """What the pictures of an input show."""

    classes: tuple[str, ...]  # names, sorted
    indices: Tensor  # int64 [n], into `classes`


@dataclass(frozen=True, eq=False)
class Layer:
    """A place in a model's description. The methods of `Model` make it; pass it on to the next of them."""

    name: str
    shape: tuple[int, ...]  # of what it gives for one example
    module: nn.Module  # computes it from what the source gives
    source: Layer | None  # None for an input

    @property
    def parameters(self) -> int:
        """How many numbers it learns."""
        return sum(p.numel() for p in self.module.parameters())


@dataclass(frozen=True, eq=False)
class ImageInput(Layer):
    """A folder of pictures as a layer: [channels, rows, cols] each, float32 from 0 (black) to 1."""

    directory: Path
    labels: Labels
    images: Tensor  # [n, channels, rows, cols]
    split: Split  # which of them are trained on, and which are held out


def path_to(layer: Layer) -> list[Layer]:
    """The layers from the input, left out, to this one."""
    found: list[Layer] = []
    while layer.source is not None:
        found.append(layer)
        layer = layer.source
    return found[::-1]


def shape_after(name: str, source: Layer, module: nn.Module) -> tuple[int, ...]:
    """The shape of what `module` makes of one example, from a try in evaluation mode that changes nothing."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            result = module(torch.zeros(1, *source.shape))
    except (RuntimeError, ValueError, IndexError) as error:
        raise SettingError(
            f"{name} does not fit on {source.name!r}, which gives {list(source.shape)} for one example: {error}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(result, Tensor) or result.ndim < 2:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise SettingError(
            f"{name}: a layer gives one tensor [n, …], but its module gives {got}. Wrap it in one that does"
        )
    return tuple(result.shape[1:])


def sequence(**modules: nn.Module) -> nn.Sequential:
    """These modules one after the other, under these names."""
    return nn.Sequential(OrderedDict(modules))


def relabelled(folder: ImageFolder, labels: Labels) -> tuple[Tensor, Tensor]:
    """The examples of another folder, numbered as the model numbers its labels."""
    unknown = [name for name in folder.classes if name not in labels.classes]
    if unknown:
        known = ", ".join(labels.classes[:12])
        raise DataError(f"The labels {', '.join(map(repr, unknown[:5]))} are not among the model's: {known}.")
    index = torch.tensor([labels.classes.index(name) for name in folder.classes])
    return folder.images, index[folder.labels]


def checked_whole(what: str, value: object) -> int:
    """`value`, if it is a whole number of at least 1; `what` names it in the SettingError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{what}={value!r}: expected a whole number of at least 1")
    return value
