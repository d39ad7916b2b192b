"""The rule of every operator that has one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from millrace.graph.passes.splitting import channels, lookups, products, reductions, views
from millrace.graph.passes.splitting.builder import Builder
from millrace.graph.passes.splitting.values import Value

# A rule gives the node's value in the split graph, or None where it does not fit and the operator is to run whole.
Rule = Callable[[Builder, Node], Value]

RULES: dict[Any, Rule] = {
    **views.RULES,
    **products.RULES,
    **reductions.RULES,
    **lookups.RULES,
    **channels.RULES,
}
