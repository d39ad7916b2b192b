"""Packages that only some tasks need."""

from __future__ import annotations

import importlib
from typing import Any

from millrace.errors import DataError


def require(module: str, *, extra: str, package: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: "sklearn.datasets".
        extra: of millrace, which installs the package.
        package: as people call it.

    Raises:
        DataError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"This task needs {package}, which cannot be imported ({error}). Install it with: "
            f"pip install 'millrace[{extra}]'"
        ) from error
