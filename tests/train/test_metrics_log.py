"""metrics.jsonl through cuts and resumes, as properties."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import RunDirectoryError, SettingError
from millrace.train.metrics_log import MetricsLog, format_line, kept_lines, read_metrics

values = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name not in ("step", "time_s")),
    st.floats(width=32),
    max_size=3,
)
logs = st.lists(st.tuples(st.integers(0, 20), values), max_size=12).map(
    lambda log: sorted(log, key=lambda item: item[0])
)


def same(left: object, right: object) -> bool:
    """Equality under which NaN equals itself."""
    return repr(left) == repr(right)


@settings(deadline=None)  # it syncs files to disk
@given(log=logs, last_step=st.integers(-1, 21), data=st.data())
def test_rewinding_any_cut_of_a_log_leaves_exactly_the_whole_lines_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[tuple[int, dict[str, float]]],
    last_step: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [format_line(step, named, 0.0) for step, named in log]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    # A line is whole when nothing but its line end is missing.
    ends = [sum(map(len, lines[: n + 1])) - 1 for n in range(len(lines))]
    whole = [item for item, end in zip(log, ends, strict=True) if end <= cut]
    records = read_metrics(path)
    assert same(records, [{"step": step, "time_s": 0.0, **named} for step, named in whole])

    writer = MetricsLog(path)
    dropped = writer.rewind(last_step)
    kept = [item for item in whole if item[0] <= last_step]
    assert dropped == len(content[:cut].splitlines()) - len(kept)
    writer.append(last_step + 1, {"loss": 1.0}, 0.0)
    writer.close()
    expected = [{"step": step, "time_s": 0.0, **named} for step, named in [*kept, (last_step + 1, {"loss": 1.0})]]
    assert same(read_metrics(path), expected)
    assert path.read_bytes() == kept_lines(path.read_bytes(), last_step + 1)


@given(values)
def test_every_line_is_strict_json_and_reads_back(named: dict[str, float]) -> None:
    line = format_line(3, named, 1.5)
    assert line.count(b"\n") == 1

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(line, parse_constant=refuse)["step"] == 3


def test_tensors_are_read_and_reserved_names_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": torch.tensor(0.5, requires_grad=True), "bad": torch.tensor(math.nan)}, 2.0)
    with pytest.raises(SettingError, match="'step'"):
        log.append(2, {"step": 1.0}, 2.0)
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] == 0.5
    assert math.isnan(record["bad"])


def test_damage_before_the_last_line_is_named_and_rewinding_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(format_line(1, {}, 0.0) + b"\0\0\0\n[1]\n" + format_line(2, {}, 0.0))
    with pytest.raises(RunDirectoryError, match="line 2"):
        read_metrics(path)
    assert MetricsLog(path).rewind(None) == 2
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []
