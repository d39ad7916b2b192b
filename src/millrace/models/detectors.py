"""Which of many units tells a class best: chosen on some examples, to be measured on others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.errors import DataError


@dataclass(frozen=True)
class Detector:
    """A unit that says yes on one side of a threshold."""

    unit: int
    threshold: float
    sign: int  # 1: yes above the threshold; -1: yes below it
    chosen_at: float  # balanced accuracy on the examples that it was chosen on, which flatters it

    def says(self, values: Tensor) -> Tensor:
        """Yes or no, bool [n], from all units' values [n, units]."""
        return values[:, self.unit] * self.sign > self.threshold * self.sign


def best_detector(values: Tensor, belongs: Tensor, *, both_ways: bool = False) -> Detector:
    """The unit and the threshold with the best balanced accuracy on these examples.

    Thresholds lie half-way between two neighbouring values; of equally good choices the first is taken.

    Args:
        values: [n, units].
        belongs: bool [n], whether the example is of the class.
        both_ways: also take units that the class drives less than anything else.

    Raises:
        DataError: all examples, or none, are of the class.
    """
    if not 0 < int(belongs.sum()) < len(belongs):
        raise DataError(
            f"To choose a detector takes examples of the class and others, but of {len(belongs)} examples "
            f"{int(belongs.sum())} are of the class."
        )
    found = [_above(values.double() * sign, belongs, sign) for sign in ((1, -1) if both_ways else (1,))]
    return max(found, key=lambda detector: detector.chosen_at)


def balanced_accuracy(said: Tensor, belongs: Tensor) -> float:
    """The mean of the shares found right of the class and of the others: 0.5 by chance, whatever their numbers."""
    right = (said == belongs).double()
    return float((right[belongs].mean() + right[~belongs].mean()) / 2)


def measured_detector(
    seen: Tensor, seen_belongs: Tensor, test: Tensor, test_belongs: Tensor, *, both_ways: bool = False
) -> tuple[Detector, float]:
    """The best detector on some examples, and its balanced accuracy on others.

    Args:
        seen, test: values [n, units] of the examples to choose on, and of those to measure on.
        seen_belongs, test_belongs: bool [n], whether they are of the class.
        both_ways: as for `best_detector`.
    """
    detector = best_detector(seen, seen_belongs, both_ways=both_ways)
    return detector, balanced_accuracy(detector.says(test), test_belongs)


def _above(values: Tensor, belongs: Tensor, sign: int) -> Detector:
    """The best unit that says yes above a threshold."""
    ordered, order = values.sort(0)
    yes = belongs[order].double()
    others_below = (1 - yes).cumsum(0)[:-1] / (1 - yes).sum(0)
    class_above = 1 - yes.cumsum(0)[:-1] / yes.sum(0)
    # A cut between two equal values cannot be made.
    accuracy = torch.where(ordered[1:] > ordered[:-1], (others_below + class_above) / 2, 0.5)
    best, cut = accuracy.max(0)
    unit = int(best.argmax())
    below = int(cut[unit])
    threshold = float(ordered[below : below + 2, unit].mean())
    return Detector(unit, threshold * sign, sign, float(best[unit]))
