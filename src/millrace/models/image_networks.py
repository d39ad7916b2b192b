"""Convolutional networks that name what a picture shows: Inception-style and residual ones, for small pictures.

Both have one shape: a stem, three stages with the picture halved between them, the mean over all places, dropout, and a
linear layer called "readout". Shape suffixes: B pictures, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional


def inception(
    classes: int, width: int = 32, blocks: int = 2, dropout: float = 0.2, stride: int = 2, channels: int = 3
) -> nn.Module:
    """Every block looks at several scales at once and puts what it finds side by side.

    Args:
        classes: K.
        width: channels after the stem; every stage has twice as many as the one before.
        blocks: in each stage.
        dropout: share of the last features left out in training.
        stride: of the stem. 1 lets the stages see the picture in its full size, in four times the time.
        channels: of the pictures.

    Returns: a module [B, C, H, W] -> [B, K], for pictures of at least 8 × 8 (with stride 1, 4 × 4).

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015; the 5 × 5 convolution as two of 3 × 3, and
    batch normalization, from "Rethinking the Inception architecture for computer vision", CVPR 2016.
    """
    stages: dict[str, nn.Module] = {"stem": convolution(channels, width, 3, stride)}
    found = width
    for stage in range(3):
        wide = width * 2**stage
        for block in range(blocks):
            stages[f"stage{stage + 1}_{block + 1}"] = InceptionBlock(found, wide)
            found = wide
        if stage < 2:
            stages[f"halved{stage + 1}"] = nn.MaxPool2d(2)
    return _with_readout(stages, found, classes, dropout)


def residual(
    classes: int, width: int = 32, blocks: int = 2, dropout: float = 0.2, stride: int = 2, channels: int = 3
) -> nn.Module:
    """Every block adds to what it was given; arguments and shapes are those of `inception`.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2; dropout before the
    readout is an addition.
    """
    stages: dict[str, nn.Module] = {"stem": convolution(channels, width, 3, stride)}
    found = width
    for stage in range(3):
        wide = width * 2**stage
        for block in range(blocks):
            stages[f"stage{stage + 1}_{block + 1}"] = ResidualBlock(found, wide, stride=2 if stage and not block else 1)
            found = wide
    return _with_readout(stages, found, classes, dropout)


class InceptionBlock(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, H, W]: a quarter of the outputs each from 1×1, 3×3, twice 3×3, and pooling.

    Args: outputs: at least 4.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        quarter = outputs // 4
        self.point = convolution(inputs, outputs - 3 * quarter, 1)
        # In front of the larger ones, 1×1 convolutions to fewer channels keep the work small.
        self.near = nn.Sequential(convolution(inputs, quarter, 1), convolution(quarter, quarter, 3))
        self.far = nn.Sequential(
            convolution(inputs, quarter, 1), convolution(quarter, quarter, 3), convolution(quarter, quarter, 3)
        )
        self.pooled = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), convolution(inputs, quarter, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.point(images), self.near(images), self.far(images), self.pooled(images)], dim=1)


class ResidualBlock(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]: relu(x + two convolutions of x).

    Where the shapes differ, a 1×1 convolution of x stands for x (the paper's option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3, relu=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride, relu=False)

    def forward(self, images: Tensor) -> Tensor:
        added: Tensor = self.second(self.first(images))
        return functional.relu(self.shortcut(images) + added)


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, *, relu: bool = True) -> nn.Sequential:
    """A convolution of size × size that keeps the picture's size (or divides it by `stride`), batch-normalized."""
    layers: dict[str, nn.Module] = {
        "convolution": nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        "norm": nn.BatchNorm2d(outputs),
    }
    return nn.Sequential(OrderedDict(layers | ({"relu": nn.ReLU()} if relu else {})))


def _with_readout(stages: dict[str, nn.Module], features: int, classes: int, dropout: float) -> nn.Module:
    end = {
        "mean": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "dropout": nn.Dropout(dropout),
        "readout": nn.Linear(features, classes),
    }
    return nn.Sequential(OrderedDict(stages | end))
