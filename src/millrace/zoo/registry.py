"""Which tasks there are: every file of this folder that says `TASK = …`, found without importing it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from millrace.errors import SettingError, did_you_mean

if TYPE_CHECKING:
    from millrace.zoo.base import Task

_FOLDER = Path(__file__).parent


def summaries() -> dict[str, str]:
    """Every task's name and what it does (the first line of its file's docstring), in alphabetical order.

    Tasks import torch and more, so their files are only parsed.
    """
    found = {}
    for file in sorted(_FOLDER.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(_assigns_task(statement) for statement in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def check_name(name: str) -> None:
    """Raise SettingError, with the nearest names, unless there is a task of this name."""
    known = list(summaries())
    if name not in known:
        raise SettingError(f"There is no task {name!r}. {did_you_mean(name, known)}")


def load(name: str) -> type[Task[Any]]:
    """Import a task.

    Raises:
        SettingError: there is no such task; the message suggests the near names.
    """
    check_name(name)
    return cast("type[Task[Any]]", importlib.import_module(f"millrace.zoo.{name}").TASK)


def _assigns_task(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "TASK" for target in statement.targets
    )
