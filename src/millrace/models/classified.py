"""What a classifier says of all examples of a data set, and which classes it takes for others."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from millrace.data.batches import Batches


class Classified(NamedTuple):
    """Examples in the order of their pass, on the CPU."""

    inputs: Tensor  # [n, …]
    labels: Tensor  # int64 [n]
    logits: Tensor  # [n, classes]

    @property
    def said(self) -> Tensor:
        """The likeliest class of each, int64 [n]."""
        return self.logits.argmax(-1)

    def mistakes(self) -> Counter[tuple[int, int]]:
        """How often an example of one class was taken for another's: (label, said) -> count."""
        wrong = self.said != self.labels
        return Counter(zip(self.labels[wrong].tolist(), self.said[wrong].tolist(), strict=True))


@torch.no_grad()
def classified(model: nn.Module, batches: Batches) -> Classified:
    """One pass.

    Args:
        model: inputs [B, …] to logits [B, classes]; it is taken as it is, so put it in evaluation mode before.
        batches: of (inputs, labels).
    """
    device = next(model.parameters()).device
    found = [(inputs, labels, model(inputs.to(device)).cpu()) for inputs, labels in batches.one_pass()]
    return Classified(*(torch.cat(list(part)) for part in zip(*found, strict=True)))
