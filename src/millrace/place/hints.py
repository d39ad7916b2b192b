"""What a user says about where things go, and what that leaves of the devices for every group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch._ops import OpOverload
from torch.fx import Node

from millrace.errors import PlacementError
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase
from millrace.place.cluster import Cluster
from millrace.place.grouping import Grouping
from millrace.place.paths import inside, path_of

_KINDS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
_BACKENDS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Hints:
    """A user's wishes. `*` in a pattern stands for anything; a pattern also means what is inside the modules it names.
    The blocks of a split layer are its submodules "block 0", "block 1", ….

    Devices are written as in the cluster ("/host:0/gpu:1", "gpu:1"), or as a kind ("cpu", "gpu") for any of that kind.

    modules: pattern of module paths -> device. variables: pattern of variable names -> device, for them and their
    update. operators: pattern of operator names ("aten.embedding*") -> device. together: patterns of module paths that
    share one device, whichever it is.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, hints: Hints | Mapping[str, str] | None) -> Hints:
        """Hints from what users write: a mapping is of module paths."""
        return hints if isinstance(hints, Hints) else cls(modules=dict(hints or {}))


@dataclass(frozen=True)
class Demand:
    """One reason for a group to be somewhere. device: as the user wrote it."""

    device: str
    reason: str


def label_of(node: Node, path: str, hints: Hints) -> str:
    """What keeps a node apart from, or together with, others in groups; "" where the hints do not say.

    Args: path: the module that the node is counted to, also where it runs outside of all.
    """
    for patterns in hints.together:
        if any(inside(path, pattern) for pattern in patterns):
            return " + ".join(patterns)
    devices = dict.fromkeys(demand.device for demand in demands_of(node, path, hints))
    return "".join(f" on {device}" for device in devices)


def demands_of(node: Node, path: str, hints: Hints) -> list[Demand]:
    """What the hints say of one node, which is counted to a module."""
    known = info(node)
    found = [
        Demand(device, f"module {path!r} matches {pattern!r}, which is to be on {device}")
        for pattern, device in hints.modules.items()
        if path and inside(path, pattern)
    ]
    if known.phase is Phase.UPDATE and known.variable:
        found += [
            Demand(device, f"variable {known.variable!r} matches {pattern!r}, which is to be on {device}")
            for pattern, device in hints.variables.items()
            if fnmatchcase(known.variable, pattern)
        ]
    found += [
        Demand(device, f"operator {node.target} ({node.name}) matches {pattern!r}, which is to be on {device}")
        for pattern, device in hints.operators.items()
        if fnmatchcase(str(node.target), pattern)
    ]
    return found


def allowed_devices(graph: Graph, grouping: Grouping, cluster: Cluster, hints: Hints) -> np.ndarray:
    """[G, D]: whether a group may be on a device.

    Raises: PlacementError when a hint names no device or fits nothing, or when the hints leave a group no device: with
        all the reasons.
    """
    _refuse_idle(graph, hints)
    allowed = np.ones((len(grouping.groups), len(cluster.devices)), dtype=bool)
    reasons: dict[int, dict[Demand, None]] = {}
    kinds: dict[int, dict[Node, None]] = {}
    for task in grouping.tasks:
        for node in task.nodes:
            for demand in demands_of(node, path_of(node), hints):
                reasons.setdefault(task.group, {})[demand] = None
            if _is_users_own(node):
                kinds.setdefault(task.group, {})[node] = None
    for group, demands in reasons.items():
        for demand in demands:
            allowed[group] &= _devices(cluster, demand.device)
    for group, nodes in kinds.items():
        for node in nodes:
            allowed[group] &= np.array([has_kernel(node, device.kind) for device in cluster.devices])
    for group, name in enumerate(grouping.groups):
        if not allowed[group].any():
            said = [demand.reason for demand in reasons.get(group, {})]
            said += [f"operator {n.target} has a kernel only for {_kernels(n)}" for n in kinds.get(group, {})]
            raise PlacementError(
                f"no device is left for {name!r}: " + "; ".join(dict.fromkeys(said)) + ". Drop one of these wishes, or "
                f"divide the module. The cluster has {', '.join(device.name for device in cluster.devices)}."
            )
    return allowed


def has_kernel(node: Node, kind: str) -> bool:
    """Whether a user's operator can run on a kind of device."""
    assert isinstance(node.target, OpOverload)
    overload = node.target._overloadname
    name = node.target._schema.name + ("" if overload == "default" else f".{overload}")
    keys = (_BACKENDS.get(kind, "CPU"), "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _kernels(node: Node) -> str:
    return ", ".join(kind for kind in _BACKENDS if has_kernel(node, kind)) or "no kind of device that is known"


def _is_users_own(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "prim", "millrace")


def _devices(cluster: Cluster, written: str) -> np.ndarray:
    """[D]: which devices a hint means."""
    if written in _KINDS:
        found = np.array([device.kind == _KINDS[written] for device in cluster.devices])
        if not found.any():
            raise PlacementError(f"a hint asks for a {written}, but the cluster has none.")
        return found
    return np.array([device is cluster.device(written) for device in cluster.devices])


def _refuse_idle(graph: Graph, hints: Hints) -> None:
    """A hint that fits nothing is a misspelt one."""
    paths = {path_of(node) for node in graph.nodes} - {""}
    owners = {info(node).variable for node in graph.nodes if info(node).phase is Phase.UPDATE}
    targets = {str(node.target) for node in graph.nodes}
    _check("module path", [*hints.modules, *(p for group in hints.together for p in group)], paths, inside)
    _check("trained variable", hints.variables, owners, fnmatchcase)
    _check("operator", hints.operators, targets, fnmatchcase)


def _check(what: str, patterns: Iterable[str], known: set[str], fits: object) -> None:
    for pattern in patterns:
        if not any(fits(name, pattern) for name in known):  # type: ignore[operator]
            some = ", ".join(sorted(known)[:8])
            raise PlacementError(f"the hint {pattern!r} fits no {what} of the graph. There are {some}, …")
