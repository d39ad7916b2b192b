"""What README.md shows does what it says: its programs run, and print what stands beside them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import millrace
from millrace.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PROGRAM = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
PROGRAMS = PROGRAM.findall(TEXT)


@dataclass(frozen=True)
class Ran:
    """A program of the README that was run as a file of its own, in a directory of its own."""

    printed: str
    directory: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    return [_run(program, tmp_path_factory.mktemp("readme")) for program, _ in PROGRAMS]


def _run(program: str, directory: Path) -> Ran:
    file = directory / "program.py"
    file.write_text(program)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(millrace.__file__).parents[1]),
        "MILLRACE_CACHE": str(directory / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, file], cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return Ran(done.stdout, directory)


def test_every_program_is_run() -> None:
    assert len(PROGRAMS) == 2
    assert PROGRAMS[1][1], "the second program's output is shown"


def test_programs_print_what_is_shown(ran: list[Ran]) -> None:
    for (_, shown), done in zip(PROGRAMS, ran, strict=True):
        printed = done.printed.splitlines()
        for line in shown.splitlines():
            assert line == "…" or line in printed


def test_the_first_program_learns_to_read_and_keeps_its_run(ran: list[Ran]) -> None:
    accuracy = float(re.search(r"([\d.]+)% of the scans", ran[0].printed)[1])  # type: ignore[index]
    assert accuracy > 85
    assert list(ran[0].directory.glob("runs/*/checkpoints/step-*"))


def test_the_second_program_runs_the_nodes_it_says(ran: list[Ran]) -> None:
    said = re.search(r"runs the (\d+) nodes", PROGRAMS[1][0])
    namespace = runpy.run_path(str(ran[1].directory / "program.py"))
    assert len(namespace["session"].nodes_for("gradient", (namespace["x"], namespace["y"]))) == int(said[1])  # type: ignore[index]


def test_links_lead_somewhere() -> None:
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", TEXT) if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", TEXT))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^millrace .*?(?=  +#|$)", TEXT, re.MULTILINE))
def test_commands_and_their_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, command, *rest = line.split()
    assert command in COMMANDS
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    documented = capsys.readouterr().out
    assert [word for word in rest if word.startswith("--") and word not in documented] == []
