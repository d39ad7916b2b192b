"""The placement algorithms by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from millrace.errors import PlacementError, did_you_mean
from millrace.place.algorithms.auto import auto
from millrace.place.algorithms.base import Algorithm
from millrace.place.algorithms.exact import exact
from millrace.place.algorithms.expert import expert
from millrace.place.algorithms.heft import heft
from millrace.place.algorithms.hints_only import hints_only
from millrace.place.algorithms.interleaved import interleaved
from millrace.place.algorithms.local_search import local_search
from millrace.place.algorithms.pipeline import pipeline
from millrace.place.algorithms.policy_gradient import policy_gradient
from millrace.place.algorithms.round_robin import round_robin

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "auto": auto,
        "exact": exact,
        "expert": expert,
        "heft": heft,
        "hints_only": hints_only,
        "interleaved": interleaved,
        "local_search": local_search,
        "pipeline": pipeline,
        "policy_gradient": policy_gradient,
        "round_robin": round_robin,
    }
)


def algorithm(name: str) -> Algorithm:
    """A placement algorithm by its name. Raises: PlacementError with the nearest names."""
    if name not in ALGORITHMS:
        raise PlacementError(f"no placement algorithm is called {name!r}. {did_you_mean(name, list(ALGORITHMS))}")
    return ALGORITHMS[name]
