"""The settings of a run in one place, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from millrace.compile.tiered import TIERS
from millrace.errors import SettingError, did_you_mean
from millrace.graph.training import PRECISIONS
from millrace.place.cluster import Cluster
from millrace.place.hints import Hints
from millrace.place.wire import Wire
from millrace.replicas.settings import Hybrid, LocalSteps, Update, check_wire, update_of, with_servers
from millrace.runtime.transport.choose import check_transport
from millrace.train.early_stopping import EarlyStopping

Devices = int | str | Path | Sequence[int] | Sequence[str] | Cluster


class PlanSettings(TypedDict, total=False):
    """The settings of a `Plan` as keywords, for whoever takes them to pass them on."""

    steps: int | None
    epochs: int | None
    precision: str
    schedule: Callable[[Tensor], Tensor] | None
    accumulate: int
    partitions: int
    devices: Devices | None
    placement: Hints | Mapping[str, str] | None
    microbatches: int
    time_chunks: int
    transport: str | None
    wire: Mapping[str, str] | str | None
    replicas: int | None
    update: str | Update
    parameter_servers: int | None
    backup: int | None
    cluster: str | None
    spares: int
    room_within_s: float
    chaos_s: float | None
    patience_s: float | None
    drop_failing: bool
    imports: Sequence[str]
    compile: str
    steps_per_call: int
    seed: int
    evaluate_every: int | None
    checkpoint_every: int | None
    keep_last: int
    keep_best: int
    monitor: str
    mode: Literal["min", "max"]
    early_stopping: EarlyStopping | None
    log_every: int
    progress: bool
    run_dir: str | Path | bool
    resume: bool


_INTERVALS = ("evaluate_every", "checkpoint_every", "log_every")
_PARTS = ("accumulate", "partitions", "microbatches", "replicas", "time_chunks")
_COUNTS = ("steps", "epochs", *_PARTS, "steps_per_call", *_INTERVALS)
GPU = "gpu"
FIXED = ("seed", "accumulate", "precision", "partitions")  # of a run: resumed, it keeps them


@dataclass(frozen=True)
class Plan:
    """How to train; `fit` documents each of them.

    Counts are in steps unless named otherwise. None means: choose by the data (an evaluation and a checkpoint at the
    end of every epoch).
    """

    steps: int | None = None
    epochs: int | None = None
    precision: str = "float32"
    schedule: Callable[[Tensor], Tensor] | None = None
    accumulate: int = 1
    partitions: int = 1
    devices: Devices | None = None
    placement: Hints | Mapping[str, str] | None = None
    microbatches: int = 1
    time_chunks: int = 1
    transport: str | None = None
    wire: Mapping[str, str] | str | None = None
    replicas: int | None = None
    update: str | Update = "sync"
    parameter_servers: int | None = None
    backup: int | None = None
    cluster: str | None = None
    spares: int = 1
    room_within_s: float = 30.0
    chaos_s: float | None = None
    patience_s: float | None = None
    drop_failing: bool = False
    imports: Sequence[str] = ()
    compile: str = "tiered"
    steps_per_call: int = 1
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 3
    keep_best: int = 1
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    early_stopping: EarlyStopping | None = None
    log_every: int = 10
    progress: bool = True
    run_dir: str | Path | bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise SettingError("fit needs to know when to stop: pass steps=… or epochs=… (or both)")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingError(f"{name}={value!r}: expected a whole number of at least 1")
        for name, least in (("keep_last", 1), ("keep_best", 0), ("spares", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingError(f"{name}={value!r}: expected a whole number of at least {least}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise SettingError(f"seed={self.seed!r}: expected a whole number")
        self._check_objects()
        for name, known in (("compile", TIERS), ("precision", tuple(PRECISIONS)), ("mode", ("min", "max"))):
            if getattr(self, name) not in known:
                raise SettingError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}. "
                    + did_you_mean(str(getattr(self, name)), list(known))
                )
        if self.resume and isinstance(self.run_dir, bool):
            raise SettingError("resume=True needs the run to go on with: pass run_dir='runs/…'")

    def _check_objects(self) -> None:
        known = isinstance(self.devices, int | str | Path | Sequence | Cluster | None)
        if not known or isinstance(self.devices, bool) or self.devices in (0, "", [], ()):
            raise SettingError(
                f"devices={self.devices!r}: expected how many CPU workers to use on this machine, names such as "
                '["gpu:0", "cpu:0"], "all" for every device of this machine, a cluster file, or a Cluster'
            )
        apart = {"placement": self.placement, "transport": self.transport, "wire": self.wire}
        if self.replicas is not None:
            del apart["transport"], apart["wire"]
        if self.devices is None and (
            self.microbatches > 1 or self.time_chunks > 1 or any(value is not None for value in apart.values())
        ):
            raise SettingError(
                "placement=…, microbatches=…, time_chunks=…, transport=… and wire=… are for several devices: pass "
                "devices=2, names, or a Cluster (transport=… and wire=… also with replicas=2)"
            )
        check_transport(self.transport)
        Wire.of(self.wire)
        self._check_replicas()
        if not isinstance(self.early_stopping, EarlyStopping | None):
            raise SettingError(
                f"early_stopping={self.early_stopping!r}: expected an EarlyStopping, such as EarlyStopping(patience=3)"
            )
        if not isinstance(self.run_dir, str | Path | bool):
            raise SettingError(f"run_dir={self.run_dir!r}: expected a path, True for a new one, or False for none")
        if self.schedule is not None and not callable(self.schedule):
            raise SettingError(f"schedule={self.schedule!r}: expected a function from the step to a factor")

    def _check_replicas(self) -> None:
        update = with_servers(self.update, self.parameter_servers, self.backup)
        if self.parameter_servers is not None or self.backup is not None:
            object.__setattr__(self, "update", update)
        if isinstance(update, Hybrid) and update.replicas not in (None, self.replicas):
            if self.replicas is not None:
                raise SettingError(
                    f"replicas={self.replicas} and update=Hybrid(replicas={update.replicas}) are both how many there "
                    "are in a group: say it once."
                )
            object.__setattr__(self, "replicas", update.replicas)
        if self.replicas is not None:
            check_wire(update, self.transport, self.wire)
        if self.replicas is None and (self.cluster is not None or self.update != "sync"):
            raise SettingError(
                f"update={self.update!r} and cluster={self.cluster!r} are for replicas: say how many, by replicas=2"
            )
        if self.on_gpus:
            divided = {"microbatches": self.microbatches > 1, "time_chunks": self.time_chunks > 1}
            divided["placement"] = self.placement is not None
            for what in [name for name, is_so in divided.items() if is_so]:
                raise SettingError(
                    f"{what}=… is for replicas of several devices each, and with devices={self.devices!r} each has one "
                    "GPU. Leave it out."
                )
        elif self.replicas is not None and self.devices is not None:
            refused = {"time_chunks": self.time_chunks > 1, "local steps": isinstance(update, LocalSteps)}
            for what in [name for name, is_so in refused.items() if is_so]:
                raise SettingError(f"{what} in replicas=… of several devices each is not possible: leave one out.")
        if isinstance(self.imports, str) or not all(isinstance(name, str) for name in self.imports):
            raise SettingError(f"imports={self.imports!r}: expected names of modules, such as ['my_operators']")
        for name in ("patience_s", "chaos_s", "room_within_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"{name}={value!r}: expected seconds above 0, or None")

    @property
    def on_gpus(self) -> bool:
        """Whether every replica is to compute on a GPU of its machine."""
        return self.replicas is not None and self.devices in (GPU, [GPU], (GPU,))

    @property
    def workers(self) -> int:
        """How many processes compute when replicas train, and none is missing."""
        update = update_of(self.update)
        return (self.replicas or 1) * (update.groups if isinstance(update, Hybrid) else 1)

    def refuse_changes(self, before: Mapping[str, Any]) -> None:
        """Raise SettingError where a run that goes on would become another; `before` is its `as_config`."""
        for name in FIXED:
            now, then = getattr(self, name), before.get(name)
            if then is not None and now != then:
                raise SettingError(
                    f"{name} was {then!r} when the run was started, and cannot become {now!r} half-way. Resume with "
                    f"{name}={then!r}, or start a new run."
                )

    def as_config(self) -> dict[str, Any]:
        """The settings as JSON values, for config.json."""
        plain = {}
        for field in fields(self):
            value = getattr(self, field.name)
            plain[field.name] = value if isinstance(value, int | float | str | type(None)) else repr(value)
        return plain
