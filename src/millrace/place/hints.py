"""What a user says about where things go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from millrace.errors import PlacementError
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase
from millrace.place.paths import inside, path_of


@dataclass(frozen=True)
class Hints:
    """A user's wishes. `*` in a pattern stands for anything; a pattern also means what is inside the modules it names.
    The blocks of a split layer are its submodules "block 0", "block 1", ….

    Devices are written as in the cluster ("/host:0/gpu:1", "gpu:1"), or as a kind ("cpu", "gpu") for any of that kind.

    modules: pattern of module paths -> device. variables: pattern of variable names -> device, for them and their
    update. operators: pattern of operator names ("aten.embedding*") -> device. together: patterns of module paths and
    variable names that share one device, whichever it is.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, hints: Hints | Mapping[str, str] | None) -> Hints:
        """Hints from what users write: a mapping is of module paths."""
        return hints if isinstance(hints, Hints) else cls(modules=dict(hints or {}))


def refuse_idle(graph: Graph, hints: Hints) -> None:
    """A hint that fits nothing is a misspelt one. Raises: PlacementError that names it."""
    paths = {path_of(node) for node in graph.nodes} - {""}
    owners = {info(node).variable for node in graph.nodes if info(node).phase is Phase.UPDATE}
    targets = {str(node.target) for node in graph.nodes}
    _check("module path", hints.modules, paths, inside)
    _check("trained variable", hints.variables, owners, fnmatchcase)
    together = [pattern for group in hints.together for pattern in group]
    _check("module path or trained variable", together, paths | owners, inside)
    _check("operator", hints.operators, targets, fnmatchcase)


def _check(what: str, patterns: Iterable[str], known: set[str], fits: object) -> None:
    for pattern in patterns:
        if not any(fits(name, pattern) for name in known):  # type: ignore[operator]
            some = ", ".join(sorted(known)[:8])
            raise PlacementError(f"the hint {pattern!r} fits no {what} of the graph. There are {some}, …")
