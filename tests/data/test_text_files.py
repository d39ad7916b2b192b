"""A text file is read whole, and one that cannot be is named, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.data.text_files import read_text
from millrace.errors import DataError


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    file.write_bytes("grün,\n\n  blau".encode())
    assert read_text(file) == "grün,\n\n  blau"


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\xff\xfe", "it is not UTF-8 text")], ids=["missing", "bytes"]
)
def test_what_cannot_be_read_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "it.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"it\.txt cannot be read: {reason}.*\. Give lines of words\.$"):
        read_text(file, "Give lines of words.")


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Give a file of plain text"):
        read_text(tmp_path)
