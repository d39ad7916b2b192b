"""A task's settings: typed fields with a default, a range and a line of help, read from `key=value` texts or JSON.

    @dataclass(frozen=True)
    class DigitsSettings(Settings):
        width: int = setting(32, "channels of the first convolution", low=1)

The type of a field decides how its text is read, so there is nothing else to declare. All settings are checked as they
are made: a wrong one is found before any data is read.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from millrace.errors import SettingError, did_you_mean

S = TypeVar("S", bound="Settings")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}


def setting(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, on_resume: bool = False
) -> Any:
    """One field of a task's settings.

    Args:
        default: of the field's type.
        help: what it means, with its unit, in a few words.
        low, high: the range that a number must lie in, both ends included.
        on_resume: whether a run that goes on may change it.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "on_resume": on_resume})


@dataclass(frozen=True)
class Settings:
    """The settings that every task has; tasks inherit them and give defaults of their own.

    A run ends at `steps` or at `epochs`, whichever comes first; evaluation and checkpoints are at the end of every
    epoch where their interval is none.
    """

    seed: int = setting(0, "of the initial weights, the data's order and all random numbers")
    steps: int | None = setting(None, "stop after so many steps", low=1, on_resume=True)
    epochs: int | None = setting(None, "stop after so many passes over the training data", low=1, on_resume=True)
    batch_size: int = setting(32, "examples per step", low=1)
    precision: Literal["float32", "bfloat16"] = setting("float32", "of the arithmetic; weights stay float32")
    compile: Literal["tiered", "eager", "inductor"] = setting(
        "tiered", "eager at once and compiled when ready, or one of the two", on_resume=True
    )
    steps_per_call: int = setting(1, "steps in one compiled call, for small models", low=1)
    threads: int | None = setting(None, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    evaluate_every: int | None = setting(None, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(None, "steps between checkpoints", low=1, on_resume=True)

    def __post_init__(self) -> None:
        for described in describe(type(self)):
            _check(described, getattr(self, described.name))


@dataclass(frozen=True)
class Described:
    """One setting, as `describe` finds it."""

    name: str
    default: Any
    help: str
    accepted: tuple[Any, ...]  # types, and the values of a Literal
    low: float | None
    high: float | None
    on_resume: bool

    def expected(self) -> str:
        """What the setting takes, in words."""
        words = [_EXPECTED[kind] if isinstance(kind, type) else str(kind) for kind in self.accepted]
        if self.low is not None or self.high is not None:
            low, high = (None if end is None else f"{end:g}" for end in (self.low, self.high))
            within = f"from {low} to {high}" if low and high else f"of at least {low}" if low else f"of at most {high}"
            words[0] += f" {within}"
        return " or ".join(words)


def describe(settings: type[Settings]) -> Iterator[Described]:
    """Every setting of a class, in order."""
    hints = get_type_hints(settings)
    for each in fields(settings):
        yield Described(
            each.name,
            each.default,
            str(each.metadata.get("help", "")),
            _accepted(hints[each.name], each),
            each.metadata.get("low"),
            each.metadata.get("high"),
            bool(each.metadata.get("on_resume")),
        )


def parse_settings(base: S, assignments: Sequence[str]) -> S:
    """`base` with the changes that texts such as "epochs=3" ask for; of two for one name the later counts.

    Raises:
        SettingError: a text is no `key=value`, a name is unknown (the message suggests the near ones), or a value does
            not fit the setting's type or range.
    """
    known = {described.name: described for described in describe(type(base))}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise SettingError(f"A setting is given as key=value, but got {assignment!r}. For example: --set seed=1.")
        if name not in known:
            raise SettingError(f"There is no setting {name!r}. {did_you_mean(name, list(known))}")
        changes[name] = _read(known[name], text.strip())
    return replace(base, **changes)


def settings_to_json(settings: Settings) -> dict[str, Any]:
    """As a JSON value for `settings_from_json`."""
    return asdict(settings)


def settings_from_json(kind: type[S], values: Mapping[str, Any]) -> S:
    """The settings that `settings_to_json` wrote; those that were not written have their defaults.

    Raises:
        SettingError: a name is unknown, or a value does not fit.
    """
    known = [described.name for described in describe(kind)]
    for name in values:
        if name not in known:
            raise SettingError(
                f"The run was made with a setting {name!r}, which {kind.__name__} does not have: it is of another "
                f"version. Use the version in its environment.json. {did_you_mean(name, known)}"
            )
    return kind(**values)


def refuse_changes_on_resume(before: S, after: S) -> None:
    """Raise SettingError where `after` differs in a setting that a run keeps for its whole life."""
    kinds = list(describe(type(before)))
    free = ", ".join(described.name for described in kinds if described.on_resume)
    for described in kinds:
        old, new = getattr(before, described.name), getattr(after, described.name)
        if old != new and not described.on_resume:
            raise SettingError(
                f"The run was started with {described.name}={old}, so it cannot go on with {described.name}={new}: "
                f"only {free} may change. Start a new run for that."
            )


def _accepted(hint: Any, of: Field[Any]) -> tuple[Any, ...]:
    """The types and literal values in a type hint."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in get_args(hint) for kind in _accepted(part, of))
    if hint not in _EXPECTED:
        raise SettingError(
            f"The setting {of.name!r} is declared as {hint}, but settings are int, float, bool, str, Literal, or one "
            "of these | None."
        )
    return (hint,)


def _read(described: Described, text: str) -> Any:
    """The value that a text means, by the first of the accepted types that can read it."""
    for kind in described.accepted:
        if not isinstance(kind, type):
            if text == str(kind):
                return kind
        elif kind is type(None):
            if text.lower() in ("none", "null", ""):
                return None
        elif kind is bool:
            if text.lower() in _TRUE + _FALSE:
                return text.lower() in _TRUE
        else:
            try:
                return kind(text)
            except ValueError:
                continue
    raise _misfit(described, text)


def _check(described: Described, value: Any) -> None:
    literals = [kind for kind in described.accepted if not isinstance(kind, type)]
    allowed = {kind for kind in described.accepted if isinstance(kind, type)}
    if float in allowed:
        allowed.add(int)
    if value not in literals and type(value) not in allowed:
        raise _misfit(described, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = (
            end if end is not None else default
            for end, default in ((described.low, -math.inf), (described.high, math.inf))
        )
        if not (math.isfinite(value) and low <= value <= high):
            raise _misfit(described, value)


def _misfit(described: Described, value: Any) -> SettingError:
    literals = [str(kind) for kind in described.accepted if not isinstance(kind, type)]
    hint = f" {did_you_mean(str(value), literals)}" if literals else ""
    return SettingError(f"The setting {described.name} takes {described.expected()}, but got {value!r}.{hint}")
