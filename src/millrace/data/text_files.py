"""A text file of a user's, whole."""

from __future__ import annotations

from pathlib import Path

from millrace.errors import DataError


def read_text(file: Path, wanted: str = "Give a file of plain text.") -> str:
    """All that a file holds, as UTF-8.

    Args:
        file: to read.
        wanted: what to do about one that cannot be read; the end of the error's message.

    Raises:
        DataError: it is missing, cannot be read, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"The text file {file} cannot be read: {reason}. {wanted}") from error
