"""What hints and the model's own code ask for, and what that leaves of the devices for every group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from torch.fx import Node

from millrace.errors import PlacementError
from millrace.graph.graph import Graph, Wish, info
from millrace.graph.signature import Phase
from millrace.place.cluster import Cluster
from millrace.place.code_wishes import Said, said_in_code
from millrace.place.grouping import Grouping
from millrace.place.hints import Hints
from millrace.place.kernels import KINDS, has_kernel, is_users_own, kinds_with_kernel
from millrace.place.paths import inside, path_of

_KINDS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}


@dataclass(frozen=True)
class Demand:
    """One reason for a group to be somewhere. device: as the user wrote it."""

    device: str
    reason: str


class Demands:
    """What hints, and the model's own code, say of the nodes of a graph.

    Args: like: those of another graph of the same step; what is together there is so here, too.
    """

    def __init__(self, graph: Graph, hints: Hints, like: Demands | None = None) -> None:
        self._hints = hints
        self._said = said_in_code(graph)
        # Of those to be together: name -> another of the same nodes.
        self._united: dict[str, str] = dict(like._united) if like else {}
        for node in graph.nodes:
            names = list(self.together(node, path_of(node)))
            for one, other in itertools.pairwise(names):
                self._united[self._root(one)] = self._root(other)

    def label(self, node: Node, path: str) -> str:
        """What keeps a node apart from, or together with, others in groups; "" where nothing is said.

        Args: path: the module that the node is counted to, also where it runs outside of all.
        """
        few = is_users_own(node) and len(kinds_with_kernel(node)) < len(KINDS)
        if few or self._is_asked_for(node):  # it need not follow those that it is counted to
            path = path_of(node)
        names = self.together(node, path)
        if names:
            root = self._root(next(iter(names)))
            return ", ".join(sorted({root, *(name for name in self._united if self._root(name) == root)}))
        devices = dict.fromkeys(demand.device for demand in self.of(node, path))
        kinds = f" for {_listed(kinds_with_kernel(node))}" if few else ""
        return "".join(f" on {device}" for device in devices) + kinds

    def of(self, node: Node, path: str) -> list[Demand]:
        """The devices that are asked for one node, which is counted to a module."""
        known, hints = info(node), self._hints
        found = [
            Demand(device, f"module {path!r} matches {pattern!r}, which is to be on {device}")
            for pattern, device in hints.modules.items()
            if path and inside(path, pattern)
        ]
        found += [
            Demand(device, f"variable {known.variable!r} matches {pattern!r}, which is to be on {device}")
            for pattern, device in hints.variables.items()
            if _is_update_of(node, pattern)
        ]
        found += [
            Demand(device, f"operator {node.target} ({node.name}) matches {pattern!r}, which is to be on {device}")
            for pattern, device in hints.operators.items()
            if fnmatchcase(str(node.target), pattern)
        ]
        said = self._said.get(node, Said())
        if said.device and (said.itself or not (found or is_users_own(node) or self._is_named(node))):
            found.append(Demand(said.device.name, _in_words("device", said.device, said.used)))
        return found

    def together(self, node: Node, path: str) -> dict[str, str]:
        """Those that a node is to share a device with: name -> the reason, in words."""
        found = {
            " + ".join(patterns): f"{' and '.join(map(repr, patterns))} are to be together"
            for patterns in self._hints.together
            if any((path and inside(path, pattern)) or _is_update_of(node, pattern) for pattern in patterns)
        }
        said = self._said.get(node, Said())
        if said.together and (said.itself or not (is_users_own(node) or self._is_named(node))):
            found[f"together {said.together.name!r}"] = _in_words("colocate", said.together, said.used)
        return found

    def _is_asked_for(self, node: Node) -> bool:
        """Whether a device is asked for this very node, rather than for its module."""
        said = self._said.get(node, Said())
        operators = self._hints.operators
        return bool(said.device and said.itself) or any(fnmatchcase(str(node.target), each) for each in operators)

    def _is_named(self, node: Node) -> bool:
        """Whether hints say by its name where the variable is that the node updates."""
        patterns = [*self._hints.variables, *(pattern for group in self._hints.together for pattern in group)]
        return any(_is_update_of(node, pattern) for pattern in patterns)

    def _root(self, name: str) -> str:
        while name in self._united and self._united[name] != name:
            name = self._united[name]
        return name


def _in_words(function: str, wish: Wish, used: str) -> str:
    says = f"{wish.line or 'the model'} says `with {function}({wish.name!r})`"
    return f"{says} around a use of {used!r}" if used else says


def allowed_devices(grouping: Grouping, cluster: Cluster, demands: Demands) -> np.ndarray:
    """[G, D]: whether a group may be on a device.

    Raises: PlacementError when a device is asked for that is not there, or when all that is asked leaves a group no
        device: with the reasons.
    """
    allowed = np.ones((len(grouping.groups), len(cluster.devices)), dtype=bool)
    reasons: dict[int, dict[str, None]] = {}
    for task in grouping.tasks:
        for node in task.nodes:
            said = reasons.setdefault(task.group, {})
            for demand in demands.of(node, path_of(node)):
                if demand.reason not in said:
                    allowed[task.group] &= _devices(cluster, demand)
                    said[demand.reason] = None
            if is_users_own(node):
                allowed[task.group] &= np.array([has_kernel(node, device.kind) for device in cluster.devices])
                line = f" ({info(node).line})" if info(node).line else ""
                said[f"operator {node.target}{line} has a kernel only for {_listed(kinds_with_kernel(node))}"] = None
            said.update(dict.fromkeys(demands.together(node, path_of(node)).values()))
    for group, name in enumerate(grouping.groups):
        if not allowed[group].any():
            raise PlacementError(
                f"no device is left for {name!r}: " + "; ".join(reasons[group]) + ". Drop one of these wishes, or "
                f"divide the module. The cluster has {', '.join(device.name for device in cluster.devices)}."
            )
    return allowed


def _devices(cluster: Cluster, demand: Demand) -> np.ndarray:
    """[D]: which devices a hint means."""
    if demand.device in _KINDS:
        found = np.array([device.kind == _KINDS[demand.device] for device in cluster.devices])
        if not found.any():
            raise PlacementError(f"{demand.reason}. This asks for a {demand.device}, but the cluster has none.")
        return found
    try:
        meant = cluster.device(demand.device)
    except PlacementError as error:
        raise PlacementError(f"{demand.reason}. But {error}") from error
    return np.array([device is meant for device in cluster.devices])


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "no kind of device that is known"


def _is_update_of(node: Node, pattern: str) -> bool:
    """Whether a node updates a variable whose name matches."""
    known = info(node)
    return known.phase is Phase.UPDATE and bool(known.variable) and fnmatchcase(known.variable, pattern)
