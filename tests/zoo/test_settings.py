"""Settings: what texts mean, what is refused, and that JSON keeps them."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.zoo.chars import CharsSettings
from millrace.zoo.digits import DigitsSettings
from millrace.zoo.settings import (
    Settings,
    describe,
    parse_settings,
    refuse_changes_on_resume,
    setting,
    settings_from_json,
    settings_to_json,
)


@dataclass(frozen=True)
class Every(Settings):
    """One field of every kind."""

    count: int = setting(1, "how many", low=1, high=10, on_resume=True)
    rate: float = setting(0.5, "how fast", low=0)
    flag: bool = setting(False, "whether")
    word: str = setting("a", "which")
    choice: Literal["x", "y", 3] = setting("x", "of these")
    maybe: float | None = setting(None, "perhaps")


EVERY = st.builds(
    Every,
    seed=st.integers(),
    count=st.integers(1, 10),
    rate=st.floats(0, allow_infinity=False),
    flag=st.booleans(),
    word=st.text().map(str.strip),
    choice=st.sampled_from(["x", "y", 3]),
    maybe=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


@given(EVERY)
def test_what_is_written_as_text_is_read_back(settings: Every) -> None:
    texts = [f"{name}={value}" for name, value in settings_to_json(settings).items()]
    assert parse_settings(Every(), texts) == settings


@given(EVERY)
def test_json_keeps_settings(settings: Every) -> None:
    assert settings_from_json(Every, json.loads(json.dumps(settings_to_json(settings)))) == settings


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count=3", "count", 3),
        (" count = 3 ", "count", 3),
        ("rate=2", "rate", 2.0),
        ("rate=1e-3", "rate", 0.001),
        ("flag=yes", "flag", True),
        ("flag=Off", "flag", False),
        ("word=b=c", "word", "b=c"),
        ("word=", "word", ""),
        ("choice=3", "choice", 3),
        ("maybe=none", "maybe", None),
        ("maybe=2", "maybe", 2.0),
        ("batch-size=5", "batch_size", 5),
    ],
)
def test_texts_mean(text: str, name: str, value: object) -> None:
    read = getattr(parse_settings(Every(), [text]), name)
    assert (read, type(read)) == (value, type(value))


def test_of_two_for_one_name_the_later_counts() -> None:
    assert parse_settings(Every(), ["count=3", "rate=1", "count=4"]) == Every(count=4, rate=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=three", "count takes a whole number from 1 to 10, but got 'three'"),
        ("count=2.5", "but got '2.5'"),
        ("count=", "but got ''"),
        ("count=0", "but got 0"),
        ("count=11", "but got 11"),
        ("rate=-1", "rate takes a number of at least 0"),
        ("rate=nan", "but got nan"),
        ("rate=inf", "but got inf"),
        ("flag=maybe", "flag takes true or false"),
        ("choice=z", "choice takes x or y or 3"),
        ("compile=eger", "Did you mean 'eager'"),
        ("cuont=3", "There is no setting 'cuont'. Did you mean 'count'"),
        ("count", "given as key=value, but got 'count'"),
    ],
)
def test_misfits_are_refused(text: str, message: str) -> None:
    with pytest.raises(SettingError) as raised:
        parse_settings(Every(), [text])
    assert message in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize("values", [{"count": True}, {"flag": 1}, {"rate": "1"}, {"word": None}, {"count": 1.0}])
def test_values_of_a_wrong_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"The setting {next(iter(values))} takes"):
        Every(**values)


def test_a_run_of_another_version_is_refused() -> None:
    with pytest.raises(SettingError, match=r"'cuont', which Every does not have: it is of another version"):
        settings_from_json(Every, {"cuont": 3})
    assert settings_from_json(Every, {"count": 3}) == Every(count=3)


def test_a_resumed_run_keeps_what_it_was_started_with() -> None:
    refuse_changes_on_resume(Every(), Every(count=3, steps=7, threads=2, compile="eager"))
    with pytest.raises(SettingError, match=r"started with rate=0.5, so it cannot go on with rate=1.0: only steps,"):
        refuse_changes_on_resume(Every(), Every(rate=1.0))


def test_a_field_of_another_type_is_a_mistake_of_the_task() -> None:
    @dataclass(frozen=True)
    class Wrong(Settings):
        many: list[int] = setting((), "no such thing")  # noqa: RUF009

    with pytest.raises(SettingError, match="'many' is declared as"):
        Wrong()


@pytest.mark.parametrize("kind", [Settings, DigitsSettings, CharsSettings])
def test_every_setting_is_described(kind: type[Settings]) -> None:
    described = {each.name: each for each in describe(kind)}
    assert {"seed", "compile", "steps", "epochs"} <= described.keys()
    assert [name for name, each in described.items() if not each.help or not each.expected()] == []
    assert [name for name, each in described.items() if each.default != getattr(kind(), name)] == []


def test_heads_divide_the_width() -> None:
    with pytest.raises(SettingError, match="heads=3 must divide width=128"):
        parse_settings(CharsSettings(), ["heads=3"])
