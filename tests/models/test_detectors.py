"""Detectors: the best cut of all, as trying every one finds it; and what is measured on other examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import DataError
from millrace.models.detectors import balanced_accuracy, best_detector, measured_detector


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 20), st.integers(1, 4), st.booleans())
def test_no_unit_and_cut_do_better(seed: int, count: int, units: int, both_ways: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (count, units), generator=generator).float()  # with many ties
    belongs = torch.arange(count) < count // 2
    detector = best_detector(values, belongs, both_ways=both_ways)
    said = detector.says(values)
    tried = [0.0]
    for cut in torch.arange(-3.5, 4):
        for column in values.unbind(1):
            above = balanced_accuracy(column > cut, belongs)
            tried += [above, 1 - above] if both_ways else [above]
    if max(tried) > 0.5:
        assert detector.chosen_at == pytest.approx(max(tried))
        assert balanced_accuracy(said, belongs) == pytest.approx(detector.chosen_at)


def test_a_unit_that_is_low_for_the_class_serves_only_where_it_may() -> None:
    values, belongs = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([True, True, False, False])
    low = best_detector(values, belongs, both_ways=True)
    assert (low.sign, low.threshold, low.chosen_at) == (-1, 3.0, 1.0)
    assert low.says(torch.tensor([[2.0], [4.0]])).tolist() == [True, False]
    assert best_detector(values, belongs).chosen_at < 0.5


def test_chance_is_a_half_however_few_are_of_the_class() -> None:
    belongs = torch.arange(100) < 3
    for said in (torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)):
        assert balanced_accuracy(said, belongs) == 0.5
    assert balanced_accuracy(belongs, belongs) == 1.0


@pytest.mark.parametrize("belongs", [[True, True], [False, False]])
def test_one_kind_alone_is_refused(belongs: list[bool]) -> None:
    with pytest.raises(DataError, match="are of the class"):
        best_detector(torch.randn(2, 3), torch.tensor(belongs))


def test_a_detector_is_measured_on_others_than_it_is_chosen_on() -> None:
    yes, no = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    values = torch.tensor([[5.0, 0.0], [6.0, 1.0], [0.0, 5.0], [1.0, 6.0]])
    detector, accuracy = measured_detector(values, yes, values, no)
    assert (detector.unit, detector.threshold, detector.chosen_at) == (0, 3.0, 1.0)
    assert accuracy == 0.0
    assert measured_detector(values, yes, values[[0, 2, 1, 3]], yes)[1] == 0.5
    assert measured_detector(values[:, :1], no, values[:, :1], no, both_ways=True)[1] == 1.0
