"""Whether a loss is a mean over its batch's examples, which replicas take it for: a sum would be divided by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.compile.eager import compile_eager
from millrace.errors import SettingError
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.signature import Role

LOSS = "loss"
_DIFFERENT = 0.1  # of the numbers of examples: closer ones say nothing
_EQUAL = 0.01  # far above what rounding does, also in bfloat16


def check_mean(whole: Graph, part: Graph, variables: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> bool:
    """Compare the loss over many copies of one example with that over fewer copies of it: a mean is the same, a sum
    grows as their number does. Two forward passes, in this process.

    Args: whole, part: the step, traced for two sizes of batch. variables: by name. feeds: of a batch of any size, with
        the batch as the first axis of each.

    Returns: whether it could be seen. Not where there is no loss, or it is zero, not finite or drawn by lot (dropout).

    Raises: SettingError for a sum.
    """
    counts = [graph.feeds[0].spec.shape[0] for graph in (whole, part)]
    ratio = counts[0] / counts[1]
    graphs = [prune(graph, (LOSS,), ()) for graph in (whole, part) if LOSS in graph.fetches]
    if abs(ratio - 1) < _DIFFERENT or len(graphs) < 2 or _draws(graphs[0]):
        return False
    try:
        of_whole, of_part = (_of_copies(*each, variables, feeds) for each in zip(graphs, counts, strict=True))
    except Exception:  # it is not made for equal examples; what else is wrong with it, a worker will say
        return False
    if of_part == 0 or not math.isfinite(of_whole):
        return False
    if math.isclose(of_whole, ratio * of_part, rel_tol=_EQUAL):
        raise SettingError(
            f"the loss is a sum over the examples: over {counts[0]} copies of an example it is {of_whole:.6g}, and "
            f"over {counts[1]} of them {of_part:.6g}. Replicas divide a batch and take the mean of the losses of its "
            "slices, so that this one, and its gradients, would be smaller the more replicas there are. Return a mean "
            "(.mean(), or reduction='mean', and a learning rate as many times as large as a batch has examples); or "
            'take update="async", which divides no batch.'
        )
    return True


def _draws(graph: Graph) -> bool:
    inputs = graph.placeholders()
    return any(inputs[v.name].users for v in graph.variables if v.role is Role.RANDOM)


def _of_copies(graph: Graph, count: int, variables: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> float:
    copies = [feed[:1].expand(count, *feed.shape[1:]).contiguous() for feed in feeds]
    with torch.no_grad():
        (loss,) = compile_eager(graph)([variables[v.name] for v in graph.variables], copies)
    return float(loss)
