"""The devices that a graph may run on, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from millrace.errors import PlacementError, did_you_mean

# Classes of operators that a device runs at different rates. All but MEMORY are counted in floating-point operations.
PRODUCT, CONVOLUTION, ATTENTION = "product", "convolution", "attention"
MEMORY = "memory"  # what moves bytes: elementwise operators, reductions, copies, lookups
CLASSES = (PRODUCT, CONVOLUTION, ATTENTION, MEMORY)
SPECIAL = "special"  # what moves bytes, too, but computes exponentials, roots and the like; MEMORY where not given


@dataclass(frozen=True)
class Device:
    """One place where nodes run, one after the other.

    name: "/host:0/gpu:1". kind: "cpu" or "cuda", which decides what operators have kernels there.
    rates: what it reaches, by class of operators: flop/s, or byte/s for "memory" and "special". "product.bfloat16" is
        the rate in one precision, "product" in every other.
    dispatch_s: what starting one operator costs. threads: of the worker process that is the device, on a CPU.
    busy_rates: what it reaches while all other devices of its host work as well, for rates that sink then, because
        devices share memory, caches and clock.
    """

    name: str
    kind: str
    memory_bytes: int
    rates: Mapping[str, float]
    dispatch_s: float = 0.0
    threads: int = 1
    busy_rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """The machine: "/host:0"."""
        return host_of(self.name)

    @property
    def torch_device(self) -> str:
        """What PyTorch calls it on its host: "cuda:1" for a GPU that is "/host:0/gpu:1".

        Raises: PlacementError for a GPU whose name does not end in a number.
        """
        if self.kind == "cpu":
            return "cpu"
        index = self.name.rpartition(":")[2]
        if not index.isdecimal():
            raise PlacementError(
                f"{self.name} is of kind {self.kind!r}, but its name does not say which one it is. "
                'Name it as its host counts it: "/host:0/gpu:0".'
            )
        return f"{self.kind}:{int(index)}"

    def rate(self, operators: str, dtype: str) -> float:
        """What it reaches in a class of operators and a precision ("float32")."""
        if operators == SPECIAL and SPECIAL not in self.rates:
            operators = MEMORY
        return self.rates.get(f"{operators}.{dtype}", self.rates[operators])

    def among_others(self) -> Device:
        """The same device while all others of its host work."""
        return replace(self, rates={**self.rates, **self.busy_rates}, busy_rates={}) if self.busy_rates else self


def host_of(device: str) -> str:
    """The machine of a device, by its name: "/host:0" for "/host:0/gpu:1"."""
    return device.rpartition("/")[0]


@dataclass(frozen=True)
class Link:
    """A way for tensors from the devices that match `source` to those that match `target` (`*` stands for anything).

    A transfer takes `latency_s` and its bytes at `bytes_per_s`. shared: whether all these pairs have one wire, so that
    their transfers wait for each other; otherwise every ordered pair has its own. sender_copies: whether the device
    that sends does the work of it, and computes nothing meanwhile, as a CPU worker that copies into shared memory.
    """

    source: str
    target: str
    latency_s: float
    bytes_per_s: float
    shared: bool = False
    sender_copies: bool = False

    def joins(self, source: str, target: str) -> bool:
        """Whether it leads from the one device to the other."""
        return fnmatchcase(source, self.source) and fnmatchcase(target, self.target)


@dataclass(frozen=True)
class Cluster:
    """Devices, and links between them; of several links that join a pair, the first one counts."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def device(self, name: str) -> Device:
        """A device by its name, whole ("/host:0/gpu:1") or its end ("gpu:1") where that says which.

        Raises: PlacementError when there is none, or several.
        """
        found = [d for d in self.devices if d.name == name] or [d for d in self.devices if d.name.endswith("/" + name)]
        if len(found) == 1:
            return found[0]
        known = [d.name for d in self.devices]
        if found:
            raise PlacementError(f"{name!r} may be any of {', '.join(d.name for d in found)}: write the whole name.")
        raise PlacementError(f"the cluster has no device {name!r}. {did_you_mean(name, known)}")

    def link(self, source: str, target: str) -> Link:
        """The link from one device to another. Raises: PlacementError when nothing joins them."""
        for link in self.links:
            if link.joins(source, target):
                return link
        raise PlacementError(
            f"no link leads from {source} to {target}. Add one to the cluster: every two devices that a model may be "
            "divided over need one in each direction."
        )
