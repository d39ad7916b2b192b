"""Putting a directory on disk all at once: readers see the whole of it or none of it, whenever the writer dies.

    step-00000123.tmp-<pid>-<token>/   being filled, or being thrown away: never read, always safe to remove
    step-00000123.old-<pid>-<token>/   a complete one that stepped aside while its successor takes its place
    step-00000123/                     complete

A writer fills the first, syncs it and renames it to the last. `recover` tidies up after writers that died: it removes
their .tmp directories, and gives an .old one its place back where the successor had not arrived. A process is known by
its number and a random token, because a restarted container often gets the number of the process that died.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import CheckpointError
from millrace.files import TOKEN, beside, sync

_LEFTOVER = re.compile(r"(?P<final>step-\d{8,})\.(?P<kind>tmp|old)-(?P<pid>\d+)(-(?P<token>[0-9a-f]+))?")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Digest:
    """What a file on disk must look like to be the one that was written."""

    sha256: str  # hexadecimal
    size_bytes: int


def write_bytes(path: Path, content: bytes) -> Digest:
    """Writes a small file and syncs it to the disk.

    Raises: OSError.
    """
    path.write_bytes(content)
    sync(path)
    return Digest(hashlib.sha256(content).hexdigest(), len(content))


def publish(temporary: Path, final: Path) -> None:
    """Gives a filled, synced directory its final name; a complete one that has the name is replaced.

    The replaced one steps aside first and is removed last, so that one of the two is whole at every moment.

    Raises: OSError, with the replaced one back in its place.
    """
    sync(temporary)
    replaced = beside(final, "old") if final.exists() else None
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def discard(final: Path) -> None:
    """Removes a complete directory; a kill on the way leaves no half of it under its final name.

    Raises: OSError.
    """
    doomed = beside(final, "tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(final, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(directory: Path) -> None:
    """Tidies up after dead writers; leaves alone what a living process is writing.

    A file system that refuses (read-only, say) is no error: leftovers are never read.
    """
    if not directory.is_dir():
        return
    for leftover in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None or _is_alive(int(match["pid"]), match["token"]):
            continue
        final = directory / match["final"]
        if match["kind"] == "old" and not final.exists():
            with contextlib.suppress(OSError):
                os.rename(leftover, final)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def write_failure(path: Path, needed_bytes: int, error: OSError) -> CheckpointError:
    """The error to raise when `path` could not be written; call it once the partial files are gone.

    Args: path: what was to be written. needed_bytes: its size. error: what the system said.
    """
    reason = error.strerror or str(error)
    if error.errno not in _NO_ROOM:
        return CheckpointError(
            f"{path} could not be written: {reason}. What was saved before is whole. "
            "Check that the folder exists and may be written to."
        )
    limit = " A file size limit is set for this process (ulimit -f)." if error.errno == errno.EFBIG else ""
    return CheckpointError(
        f"{path} could not be written: {reason}. It needs {needed_bytes:,} bytes; {_free_bytes(path):,} bytes are free."
        f"{limit} What was saved before is whole. Free some space, keep fewer checkpoints, or save to another disk."
    )


def _free_bytes(path: Path) -> int:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def _is_alive(pid: int, token: str | None) -> bool:
    if pid == os.getpid() and token is not None:
        return token == TOKEN
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
