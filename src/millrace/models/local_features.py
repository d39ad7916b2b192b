"""Features that need no labels: locally connected filters, pooled by their energy, normalized by their surroundings.

Q. V. Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012, §3.2: filters with
weights of their own at every place ("untied"), which learn to reconstruct what they see (reconstruction independent
component analysis, Le et al., NIPS 2011) from codes that are sparse when pooled over neighbours (topographic).

Shape suffixes: B images, C channels, H rows, W columns, L places (of filters), M maps, K numbers in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.errors import SettingError
from millrace.train.partitioned_layers import GroupedLinear

_TINY = 1e-4  # keeps square roots smooth at zero
_AT_A_TIME = 100  # pictures


@dataclass(frozen=True)
class Shape:
    """How one stage divides what is below it; all in places of the layer below, square."""

    window: int  # what one filter sees, rows and columns
    stride: int  # between filters
    maps: int  # filters at every place
    pool: int  # neighbouring places, rows and columns, whose energy makes one unit
    pool_stride: int = 1


class ContrastNorm(nn.Module):
    """Local contrast normalization: every value in relation to its surroundings, over all channels.

    Jarrett et al., "What is the best multi-stage architecture for object recognition?", ICCV 2009, §2.2.

    Args: width: of the surroundings, odd. floor: contrast below which nothing is amplified.
    """

    def __init__(self, width: int = 5, floor: float = 0.01) -> None:
        super().__init__()
        self.floor = floor
        distance = torch.arange(width, dtype=torch.float32) - width // 2
        bell = torch.exp(-0.5 * (distance / (width / 4)) ** 2)
        self.register_buffer("bell", (bell[:, None] * bell)[None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        centred = x_BCHW - self._around(x_BCHW)
        contrast = (self._around(centred.square()) + _TINY * self.floor).sqrt()
        return centred / contrast.clamp_min(self.floor)

    def _around(self, x_BCHW: Tensor) -> Tensor:
        """The weighted mean of the surroundings, [B, 1, H, W]; beyond the border there is nothing to count."""
        bell = self.get_buffer("bell").to(x_BCHW.dtype)
        margin = bell.shape[-1] // 2
        mean_B1HW = x_BCHW.mean(1, keepdim=True)
        counted = functional.conv2d(torch.ones_like(mean_B1HW[:1]), bell, padding=margin)
        return functional.conv2d(mean_B1HW, bell, padding=margin) / counted


@dataclass(frozen=True)
class Seen:
    """What the stages make of a batch, from the pictures up; errors and activities are means over the batch."""

    units: list[Tensor]  # of every stage, [B, M, rows, columns]
    errors: list[Tensor]  # scalars: mean square of what reconstruction leaves
    activities: list[Tensor]  # scalars: mean pooled energy, which is small where codes are sparse


class LocalStage(nn.Module):
    """One stage: filters of each place's own, the pooled energy of neighbours, and its contrast.

    Args:
        channels: of the layer below.
        side: its rows and columns.
        shape: of the stage.

    Raises:
        SettingError: the windows, or the pools, do not fit.
    """

    def __init__(self, channels: int, side: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.places = _fitting("window", side, shape.window, shape.stride)
        self.side = _fitting("pool", self.places, shape.pool, shape.pool_stride)
        seen = channels * shape.window**2
        count = self.places**2
        self.encode = GroupedLinear(count * seen, count * shape.maps, count, bias=False)
        self.decode = GroupedLinear(count * shape.maps, count * seen, count, bias=False)
        self.norm = ContrastNorm()

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stage's units [B, M, side, side], its reconstruction error, and its activity."""
        shape = self.shape
        seen_BKL = functional.unfold(x_BCHW, shape.window, stride=shape.stride)
        seen_BN = seen_BKL.transpose(1, 2).flatten(1)  # one block of K numbers for every place
        code_BN = self.encode(seen_BN)
        error = (self.decode(code_BN) - seen_BN).square().mean()
        code_BMHW = code_BN.view(-1, self.places, self.places, shape.maps).permute(0, 3, 1, 2)
        pooled = (functional.avg_pool2d(code_BMHW.square(), shape.pool, shape.pool_stride) + _TINY).sqrt()
        return self.norm(pooled), error, pooled.mean()


class LocalFeatures(nn.Module):
    """Stages on top of each other.

    Each stage learns from its own input alone: no gradient goes down from one to the next, since a stage below could
    please the one above by having little to say. All of them learn at the same time.

    Args:
        channels, side: of the pictures, square.
        shapes: of the stages, from the pictures up.
    """

    def __init__(self, channels: int, side: int, shapes: Sequence[Shape]) -> None:
        super().__init__()
        stages: list[LocalStage] = []
        for shape in shapes:
            stages.append(LocalStage(channels, side, shape))
            channels, side = shape.maps, stages[-1].side
        self.stages = nn.ModuleList(stages)

    def forward(self, pictures: Tensor) -> Seen:
        """Pictures [B, C, side, side], of mean 0 and variance 1."""
        seen, x = Seen([], [], []), pictures
        for stage in self.stages:
            # In training the stages are apart; a stimulus is optimized through all of them.
            units, error, activity = stage(x.detach() if self.training else x)
            seen.units.append(units)
            seen.errors.append(error)
            seen.activities.append(activity)
            x = units
        return seen


@torch.no_grad()
def units_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of every stage of a `LocalFeatures`, the values of all units for pictures [n, C, side, side]: [n, units], on the
    CPU."""
    device = next(model.parameters()).device
    parts = [model(part.to(device)).units for part in images.split(_AT_A_TIME)]
    return [torch.cat([units.flatten(1).float().cpu() for units in stage]) for stage in zip(*parts, strict=True)]


def _fitting(what: str, side: int, window: int, stride: int) -> int:
    """How many windows fit along a side."""
    if not 1 <= window <= side or stride < 1:
        raise SettingError(
            f"A {what} of {window} by {window}, at a distance of {stride}, does not fit on {side} by {side}. Take a "
            "smaller one, or larger pictures."
        )
    return (side - window) // stride + 1
