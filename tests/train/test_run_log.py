"""log.txt: whole lines with times, in pieces for whoever follows it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

from millrace.train.run_log import LogReader, RunLog, format_line


def test_lines_have_their_time_and_further_ones_are_indented() -> None:
    line = format_line("WorkerError: m1 is lost\nTo go on: resume", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert line == b"2026-01-02 03:04:05 WorkerError: m1 is lost\n    To go on: resume\n"
    assert format_line("", datetime(2026, 1, 2, tzinfo=UTC)) == b"2026-01-02 00:00:00 \n"


def test_a_reader_gets_what_is_new(tmp_path: Path) -> None:
    log, reader = RunLog(tmp_path / "log.txt"), LogReader(tmp_path / "log.txt")
    assert list(reader.new()) == []
    log.append("one")
    assert "".join(reader.new()).endswith(" one\n")
    log.close()
    log.append("two")
    log.append("three")
    assert [line.split()[-1] for line in "".join(reader.new()).splitlines()] == ["two", "three"]
    assert list(reader.new()) == []


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt")
    log.append("first")

    def write(letter: str) -> None:
        for _ in range(200):
            log.append(letter * 300)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert sorted(set(said)) == ["a" * 300, "b" * 300, "c" * 300, "first"]
    assert len(said) == 601


def test_a_run_is_not_ended_by_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    RunLog(tmp_path / "log.txt").append("to nobody")
