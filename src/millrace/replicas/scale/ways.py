"""The ways for replicas to agree, as far as time is concerned."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import SettingError


@dataclass(frozen=True)
class Collective:
    """Every worker waits for all in a ring all-reduce, and then updates by itself; every: local steps between two."""

    every: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self.every, "Collective.every")


@dataclass(frozen=True)
class Synchronous:
    """Gradients go to servers, which update from the first N of N + backup and drop the late ones.

    late_waits: whether a worker that was late idles until the next update, and so begins the step after it with the
    others. Otherwise it begins at once, as in TensorFlow's SyncReplicasOptimizer: behind the others, and so it will
    probably be late again.
    """

    backup: int = 0
    late_waits: bool = False

    def __post_init__(self) -> None:
        _at_least(0, self.backup, "Synchronous.backup")


@dataclass(frozen=True)
class Asynchronous:
    """Every worker by itself: fetch before every n-th computation, push the sum after every m-th."""

    fetch_every: int = 1
    push_every: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self.fetch_every, "Asynchronous.fetch_every")
        _at_least(1, self.push_every, "Asynchronous.push_every")


@dataclass(frozen=True)
class Hybrid:
    """Groups of workers, each with a ring all-reduce inside; a group pushes and fetches as one asynchronous worker."""

    group_size: int

    def __post_init__(self) -> None:
        _at_least(1, self.group_size, "Hybrid.group_size")


Way = Collective | Synchronous | Asynchronous | Hybrid


def _at_least(least: int, value: int, name: str) -> None:
    if value < least:
        raise SettingError(f"{name} must be {least} or more, got {value!r}.")
