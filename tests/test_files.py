"""Files that are replaced whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from millrace.files import replace_bytes, replacing


def test_threads_that_replace_one_file_at_once_leave_what_one_of_them_wrote(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with replacing(path) as temporary:
        temporary.write_bytes(b"ours, which is longer")
        other = threading.Thread(target=replace_bytes, args=(path, b"theirs"))
        other.start()
        other.join()
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"ours, which is longer"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_was_there_stands_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    replace_bytes(path, b"before")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
