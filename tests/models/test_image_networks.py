"""Networks for pictures: their shapes, what a block is made of, and that they learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from millrace.models.image_networks import InceptionBlock, ResidualBlock, inception, residual

torch.set_num_threads(1)
NETWORKS = [inception, residual]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("side", "width", "blocks"), [(8, 4, 1), (13, 6, 2), (32, 8, 1)])
def test_any_picture_gets_a_number_for_each_class(
    network: Callable[..., nn.Module], side: int, width: int, blocks: int
) -> None:
    model = network(7, width, blocks, channels=2)
    logits = model(torch.rand(3, 2, side, side + 1))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {n.partition(".")[0] for n, _ in model.named_parameters()} > {"stem", "readout", f"stage3_{blocks}"}


def test_the_branches_of_an_inception_block_stand_side_by_side_and_see_different_distances() -> None:
    torch.manual_seed(0)
    block = InceptionBlock(3, 18).eval()
    dot = torch.zeros(1, 3, 9, 9)
    dot[0, :, 4, 4] = 1
    with torch.no_grad():
        changed = (block(dot) - block(torch.zeros(1, 3, 9, 9)))[0].abs() > 1e-9
    reach = [int((changed[part].any(0).any(0).nonzero() - 4).abs().max()) for part in _parts(6, 4, 4, 4)]
    assert reach == [0, 1, 2, 1]


def _parts(*sizes: int) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def test_a_residual_block_adds_to_what_it_was_given() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(5, 5).eval()
    images = torch.rand(2, 5, 6, 6)
    nn.init.zeros_(block.second[0].weight)
    assert torch.equal(block(images), images)
    assert isinstance(block.shortcut, nn.Identity)
    assert ResidualBlock(5, 8, stride=2)(images).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_few_steps_tell_stripes_from_squares(network: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    row, col = torch.arange(12)[:, None], torch.arange(12)[None]
    kinds = torch.stack([(row % 2 + 0 * col), (col % 2 + 0 * row), (row + col) % 2]).float()
    labels = torch.arange(24) % 3
    images = kinds[labels][:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(24, 3, 12, 12)
    model = network(3, 8, 1, dropout=0.0, stride=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
