"""Local features: what is local stays local, contrast is relative, and stages learn apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.models.local_features import ContrastNorm, LocalFeatures, LocalStage, Shape, units_of


def features(seed: int = 0) -> LocalFeatures:
    torch.manual_seed(seed)
    return LocalFeatures(1, 12, [Shape(window=4, stride=2, maps=3, pool=2), Shape(window=4, stride=1, maps=5, pool=1)])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 11), st.integers(0, 11))
def test_a_pixel_changes_only_the_codes_of_windows_that_hold_it(row: int, col: int) -> None:
    torch.manual_seed(0)
    stage = LocalStage(1, 12, Shape(window=4, stride=2, maps=3, pool=1))
    stage.norm = torch.nn.Identity()  # type: ignore[assignment]  # which spreads what happens
    before, after = torch.randn(2, 1, 1, 12, 12).unbind(0)
    after = before.clone()
    after[0, 0, row, col] += 1
    changed = (stage(before)[0] != stage(after)[0]).any(1)[0]
    holds = torch.tensor([[2 * r <= row < 2 * r + 4 and 2 * c <= col < 2 * c + 4 for c in range(5)] for r in range(5)])
    assert changed.equal(holds)


def test_places_have_weights_of_their_own() -> None:
    stage = LocalStage(1, 12, Shape(window=4, stride=2, maps=3, pool=1))
    assert stage.encode.weight.shape == (25, 3, 16)
    tile = torch.randn(1, 1, 2, 2).repeat(1, 1, 6, 6)  # the same in every window
    energy = stage(tile)[0]
    assert not torch.allclose(energy[..., 1, 1], energy[..., 3, 2])


def test_a_unit_is_the_energy_of_its_pool_whatever_its_sign() -> None:
    stage = LocalStage(2, 9, Shape(window=3, stride=1, maps=4, pool=3, pool_stride=2))
    pictures = torch.randn(2, 2, 9, 9)
    units, _, activity = stage(pictures)
    assert units.shape == (2, 4, 3, 3)
    assert torch.allclose(units, stage(-pictures)[0], atol=1e-5)
    assert activity > 0


def test_contrast_is_relative_to_the_surroundings() -> None:
    norm = ContrastNorm(5, floor=1e-3)
    x = torch.randn(2, 3, 10, 10)
    assert torch.allclose(norm(x), norm(7 * x + 4), atol=1e-2)
    assert norm(torch.full((1, 3, 10, 10), 5.0)).abs().max() < 1e-2
    assert norm(x).std() == pytest.approx(1.0, abs=0.3)


def test_no_stage_learns_from_what_another_minimizes() -> None:
    model = features().train()
    model(torch.randn(4, 1, 12, 12)).errors[1].backward()
    first, second = model.stages
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters())


def test_a_trained_unit_can_be_followed_down_to_the_pixels() -> None:
    model = features().eval()
    pictures = torch.randn(2, 1, 12, 12, requires_grad=True)
    model(pictures).units[1][:, 0].sum().backward()  # all maps together are in balance
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0


def test_means_over_a_batch_are_those_of_its_halves() -> None:
    """So that replicas, which each see a part, agree with one process."""
    model = features()
    pictures = torch.randn(6, 1, 12, 12)
    whole, halves = model(pictures), [model(part) for part in pictures.split(3)]
    for name in ("errors", "activities"):
        for stage in (0, 1):
            mean = torch.stack([getattr(half, name)[stage] for half in halves]).mean()
            assert torch.allclose(getattr(whole, name)[stage], mean, rtol=1e-5)


@pytest.mark.parametrize(("window", "pool"), [(13, 1), (0, 1), (4, 11)])
def test_what_does_not_fit_is_refused(window: int, pool: int) -> None:
    with pytest.raises(SettingError, match="does not fit on"):
        LocalFeatures(1, 12, [Shape(window, 1, 2, pool)])


def test_units_of_many_pictures_are_those_of_each() -> None:
    model, pictures = features(), torch.randn(203, 1, 12, 12)
    found = units_of(model, pictures)
    seen = model.eval()(pictures)
    assert [len(units) for units in found] == [203, 203]
    for units, expected in zip(found, seen.units, strict=True):
        assert not units.requires_grad
        assert torch.allclose(units, expected.flatten(1), atol=1e-5)
