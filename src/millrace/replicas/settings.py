"""The ways in which replicas agree: what a user says by one word, or by one of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from millrace.errors import SettingError, did_you_mean

WIRE = "bfloat16"  # what gradients can be narrowed to


class _Named:
    """Refuses a setting that there is not, and says which there are: people write these by hand."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise SettingError(f"{cls.__name__} has no setting {name!r}. {did_you_mean(name, known)}")
        return super().__new__(cls)


@dataclass(frozen=True)
class Sync(_Named):
    """All replicas work at slices of one batch, and their gradients are put together before the update.

    parameter_servers: how many processes hold the variables; 0: every replica holds them all, and gradients are summed
        by collectives.
    backup: with servers, how many replicas more work than an update waits for; the last gradients are dropped (Chen et
        al., 2016, "Revisiting distributed synchronous SGD").
    copies: whether every server's variables are kept by a second process too, which takes its place when it is lost.
    overlap: whether collectives add up the first gradients while the last ones are computed. None: where gradients
        travel by gloo, which they do where replicas are on several hosts, or by NCCL.
    """

    parameter_servers: int = 0
    backup: int = 0
    copies: bool = True
    overlap: bool | None = None

    def __post_init__(self) -> None:
        _check_fields(self, least=0)
        if self.backup and not self.parameter_servers:
            raise SettingError(
                f"backup={self.backup} needs parameter servers, which can go on without the last gradients; a "
                "collective cannot. Pass parameter_servers=1 or more, or leave backup out."
            )
        if self.overlap is not None and self.parameter_servers:
            raise SettingError(
                f"overlap={self.overlap!r} is for collectives, and parameter_servers={self.parameter_servers} for none."
            )


@dataclass(frozen=True)
class Async(_Named):
    """Every replica fetches the variables, works at a batch of its own and pushes its gradients, without waiting.

    fetch_every, push_every: in steps of the replica; gradients are added up between two pushes.
    bound: how many batches a replica may be ahead of the slowest one (stale synchronous); None: as many as it likes.
    weaken_stale: scale a gradient by 1 / (1 + its staleness).
    overlap: push the gradients of a batch, and fetch the variables of the one after the next, while the next is
        computed. What a replica computes with lacks its own last gradients: a staleness of one more.
    parameter_servers: how many processes hold the variables.
    copies: whether every server's variables are kept by a second process too, which takes its place when it is lost.

    Source: Dean et al., 2012, "Large scale distributed deep networks" (Downpour SGD).
    """

    fetch_every: int = 1
    push_every: int = 1
    bound: int | None = None
    weaken_stale: bool = False
    overlap: bool = False
    parameter_servers: int = 1
    copies: bool = True

    def __post_init__(self) -> None:
        _check_fields(self, least=1)


@dataclass(frozen=True)
class Hybrid(_Named):
    """Groups of replicas: inside a group they work at slices of one batch and add up their gradients by collectives;
    each group pushes its gradients without waiting for the others.

    groups: how many. replicas: in each of them; None: as many as the batch has slices.
    bound: how many batches a group may be ahead of the slowest one; None: as many as it likes.
    weaken_stale: scale a group's gradient by 1 / (1 + its staleness).
    parameter_servers, copies: as of `Async`.
    """

    groups: int = 2
    replicas: int | None = None
    bound: int | None = None
    weaken_stale: bool = False
    parameter_servers: int = 1
    copies: bool = True

    def __post_init__(self) -> None:
        _check_fields(self, least=1)


@dataclass(frozen=True)
class LocalSteps(_Named):
    """Every replica trains by itself for some steps; the mean of what they changed is then a step of an outer rule.

    every: how many steps. learning_rate, momentum: of the outer rule, Nesterov's; 1.0 and 0.0 average the variables.

    Source: Douillard et al., 2023, "DiLoCo: distributed low-communication training of language models".
    """

    every: int = 20
    learning_rate: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise SettingError(f"LocalSteps(every={self.every!r}): expected a whole number of at least 1")
        if not (self.learning_rate > 0 and 0 <= self.momentum < 1):
            raise SettingError(
                f"LocalSteps(learning_rate={self.learning_rate!r}, momentum={self.momentum!r}): expected a positive "
                "rate, and a momentum of at least 0 and below 1"
            )


@dataclass(frozen=True)
class Travel:
    """How what replicas add up gets from one to another.

    transport: "shared_memory" or "gloo"; None: gloo where replicas are on several hosts, and where there is a wire;
        NCCL where each has a GPU of its own.
    wire: "bfloat16" halves what gloo sends of float32; see `gloo_group`. overlap: see `Sync`.
    """

    transport: str | None = None
    wire: str | None = None
    overlap: bool | None = None


Update = Sync | Async | Hybrid | LocalSteps

_BY_NAME: dict[str, type[Sync] | type[Async] | type[Hybrid] | type[LocalSteps]] = {
    "sync": Sync,
    "async": Async,
    "hybrid": Hybrid,
    "local_steps": LocalSteps,
}


def update_of(given: str | Update) -> Update:
    """What a user's word stands for. Raises: SettingError for an unknown one."""
    if isinstance(given, Sync | Async | Hybrid | LocalSteps):
        return given
    if given not in _BY_NAME:
        raise SettingError(
            f"update={given!r}: expected one of {', '.join(map(repr, _BY_NAME))}, or a Sync(…), Async(…), Hybrid(…) or "
            f"LocalSteps(…) of millrace.replicas.settings. {did_you_mean(str(given), list(_BY_NAME))}"
        )
    return _BY_NAME[given]()


def with_servers(update: str | Update, parameter_servers: int | None, backup: int | None) -> Update:
    """What a user's word stands for, with as many servers and backup workers as are said beside it.

    Raises: SettingError as `update_of`, for a way that has none of these, and where `update` says another number.
    """
    rule = update_of(update)
    beside = {"parameter_servers": parameter_servers, "backup": backup}
    said: dict[str, Any] = {name: value for name, value in beside.items() if value is not None}
    kind = type(rule)
    for name, value in said.items():
        if name not in kind.__dataclass_fields__:
            raise SettingError(f"{name}={value!r}: {kind.__name__} has no such setting. Leave it out.")
        own = getattr(rule, name)
        if own not in (value, getattr(kind(), name)):
            raise SettingError(f"{name}={value!r}, and update={kind.__name__}({name}={own!r}, …): say it once.")
    return replace(rule, **said) if said else rule


def check_wire(update: Update, transport: str | None, wire: Mapping[str, str] | str | None) -> None:
    """Whether replicas can agree over this. Raises: SettingError that says what they can."""
    over_servers = isinstance(update, Async) or (isinstance(update, Sync) and bool(update.parameter_servers))
    if over_servers and not (transport is None and wire is None):
        raise SettingError(
            f"transport={transport!r} and wire={wire!r} are for replicas that add up their gradients by collectives; "
            "parameter servers choose their own way and narrow nothing. Leave both out, or take "
            'update="sync" or update="hybrid".'
        )
    if wire not in (None, WIRE):
        raise SettingError(
            f"wire={wire!r}: gradients that replicas add up can travel as {WIRE!r}, or as they are (None). Other "
            "codes are for what a few devices send each other."
        )
    if wire is not None and transport == "shared_memory":
        raise SettingError(
            f"wire={wire!r} with transport='shared_memory': in the memory of one host nothing is narrowed. Leave one "
            "of the two out."
        )


def processes(update: str | Update, replicas: int, spares: int) -> int:
    """How many processes a run of so many replicas starts. Raises: SettingError for an unknown way."""
    rule = update_of(update)
    if isinstance(rule, LocalSteps):
        return replicas + spares
    if isinstance(rule, Sync):
        workers = replicas + rule.backup
    else:
        workers = replicas * (rule.groups if isinstance(rule, Hybrid) else 1)
    return workers + rule.parameter_servers * (2 if rule.copies else 1) + spares


def _check_fields(settings: Sync | Async | Hybrid, least: int) -> None:
    """Switches are True or False, counts whole numbers; None is for what is None by default."""
    for field in fields(settings):
        value, switch = getattr(settings, field.name), "bool" in str(field.type)
        if value is None and field.default is None:
            continue
        if not (isinstance(value, bool) if switch else type(value) is int and value >= least):
            expected = "True or False" if switch else f"a whole number of at least {least}"
            raise SettingError(f"{type(settings).__name__}({field.name}={value!r}): expected {expected}")
