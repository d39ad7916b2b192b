"""Files that a kill or a power cut leaves old or new, never in between; and where this user's caches are."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

TOKEN = secrets.token_hex(4)  # a restarted container often gets the number of the process that died


def user_cache() -> Path:
    """Where this user's caches are: `$MILLRACE_CACHE`, or millrace under the user's cache directory. May be missing."""
    named = os.environ.get("MILLRACE_CACHE")
    return (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "millrace"
    ).absolute()


def others_may_write(status: os.stat_result) -> bool:
    """Whether a directory of this status may hold what other users put there: nothing in it is to be run then."""
    return status.st_uid != os.getuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry in the password file
        return Path(tempfile.gettempdir()) / f"millrace-{os.getuid()}"


def beside(path: Path, kind: str) -> Path:
    """The name beside `path` under which this process fills (`"tmp"`) or keeps (`"old"`) a version of it."""
    return path.with_name(f"{path.name}.{kind}-{os.getpid()}-{TOKEN}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write the new content of `path` to, which takes its place, synced, when the context is left.

    When it is left by an error, what `path` was before still stands.

    Raises: OSError.
    """
    temporary = beside(path, "tmp")
    temporary = temporary.with_name(f"{temporary.name}-{threading.get_ident()}")  # another thread's is another file
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync(path.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace the content of a file in an existing directory, wholly or not at all. Raises: OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a directory, reach the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory with its parents, durably; one that exists is left as it is. Raises: OSError."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)
