"""Variables that a pass has split, and the whole ones that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.graph.signature import Variable


def whole_variables(variables: Sequence[Variable], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values under the names from before a split: the blocks of each split variable are joined, copied.

    Args: variables: of a graph, in its order. values: one tensor for every variable, by name.
    """
    found: dict[str, Tensor] = {}
    blocks: dict[str, list[Tensor]] = {}
    dims: dict[str, int] = {}
    for variable in variables:
        if variable.part is None:
            found[variable.name] = values[variable.name]
        else:
            blocks.setdefault(variable.part.whole, []).append(values[variable.name])
            dims[variable.part.whole] = variable.part.dim
    return found | {name: torch.cat(tensors, dims[name]) for name, tensors in blocks.items()}
