"""The zoo's tasks are found by their files, and all of them keep the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.errors import SettingError
from millrace.zoo import registry
from millrace.zoo.base import Task
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings


def test_tasks_are_the_files_that_say_so() -> None:
    found = registry.summaries()
    assert {"chars", "digits", "words"} <= found.keys()
    assert list(found) == sorted(found)
    assert all(summary.endswith(".") for summary in found.values())


@pytest.mark.parametrize("name", registry.summaries())
def test_every_task_keeps_the_contract(name: str) -> None:
    task = registry.load(name)
    assert issubclass(task, Task)
    assert task.name() == name
    assert issubclass(task.settings_type, Settings)
    settings = task.settings_type()
    assert settings.steps or settings.epochs, "a run by default must have an end"
    assert task(settings).better in ("min", "max")


def test_files_are_not_imported_to_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text('"""Cannot be imported.\n\nMore."""\n\nimport nowhere\n\nTASK = nowhere.It\n')
    (tmp_path / "helper.py").write_text('"""No task."""\n\nNO_TASK = 1\n')
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    assert registry.summaries() == {"broken": "Cannot be imported."}


@pytest.mark.parametrize(("name", "hint"), [("digit", "Did you mean 'digits'"), ("zzz", "Known: .*chars, .*digits")])
def test_unknown_names_get_near_ones(name: str, hint: str) -> None:
    with pytest.raises(SettingError, match=f"There is no task '{name}'. {hint}"):
        registry.load(name)


@pytest.mark.parametrize("name", ["base", "__init__", "../digits", ""])
def test_other_files_are_no_tasks(name: str) -> None:
    with pytest.raises(SettingError, match="There is no task"):
        registry.load(name)


def test_a_missing_package_names_the_extra() -> None:
    assert require("json", extra="zoo", package="JSON").loads("1") == 1
    with pytest.raises(Exception, match=r"needs Nothing.*pip install 'millrace\[zoo\]'"):
        require("no_such_module", extra="zoo", package="Nothing")
