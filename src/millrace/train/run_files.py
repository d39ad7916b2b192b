"""The small files of a run directory, replaced so that a kill at any moment leaves the old content or the new one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.errors import RunDirectoryError, SettingError
from millrace.files import replace_bytes


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, wholly or not at all.

    Args:
        path: the file; its directory must exist.
        data: the new content.

    Raises:
        RunDirectoryError: it cannot be written (a full disk, no permission); the earlier content still stands.
    """
    try:
        replace_bytes(path, data)
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write {path}: {error.strerror or error}. Its earlier content, if it had any, is untouched. "
            "Free some space or permit writing there, then go on."
        ) from error


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files that killed writers left in `directory` (only its one owner may call this)."""
    for leftover in directory.glob("*.tmp-*"):
        leftover.unlink(missing_ok=True)


def write_keeping_earlier(path: Path, content: bytes) -> None:
    """Replace a file; what it held before, if that differs, stays under the next free number (config.1.json)."""
    earlier = path.read_bytes() if path.exists() else content
    if earlier != content:
        copies = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
        write_atomically(next(copy for copy in copies if not copy.exists()), earlier)
    write_atomically(path, content)


def encode_json(value: object) -> bytes:
    """JSON as a person likes to read it."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def encode_config(config: Mapping[str, object]) -> bytes:
    """The JSON of settings.

    Raises:
        SettingError: names the setting that JSON cannot say.
    """
    for key, value in config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"The setting {key!r} cannot be kept as JSON: {error}. Give numbers, texts, lists and dicts of these."
            ) from error
    return encode_json(dict(config))


def read_json(path: Path) -> Any:
    """The value in a JSON file of a run directory.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"Cannot read {path}: {error}. The run directory is incomplete or damaged.") from error
