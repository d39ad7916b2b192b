"""docs/zoo/README.md: its example is a whole task that commands know, and what it says of the contract is so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.small import SOURCE, run_program

from millrace.zoo.base import Task
from millrace.zoo.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "zoo" / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# The page's commands, one after the other in one process (each would spend seconds on importing torch).
COMMANDS = """
import sys
from millrace.cli.main import main
statuses = [main(command.split()) for command in sys.argv[1:]]
sys.exit(statuses != [0] * (len(statuses) - 1) + [1])
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example's file in its zoo, as the page says."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(SOURCE / "millrace", source / "millrace", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "millrace" / "zoo" / "irises.py").write_text(EXAMPLE, encoding="utf-8")
    return source


def test_the_example_is_a_task(package: Path, tmp_path: Path) -> None:
    (tmp_path / "flower.txt").write_text("6.3 3.3 6.0 2.5\n")
    (tmp_path / "words.txt").write_text("a lovely flower\n")
    said = run_program(
        COMMANDS,
        "tasks",
        "tasks irises",
        "train irises --set compile=eager --set width=32 --json --quiet --device cpu",
        "eval latest",
        "predict latest flower.txt --device cpu",
        "predict latest words.txt --device cpu",
        cwd=tmp_path,
        PYTHONPATH=str(package),
        OMP_NUM_THREADS="1",
    )
    assert said.returncode == 0, said.stderr
    assert re.search(r"^irises +Tell three kinds of iris apart", said.stdout, re.MULTILINE)
    assert "width=16 " in said.stdout
    (values,) = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    assert values["test_accuracy"] >= 0.8
    assert "flower.txt: virginica (" in said.stdout
    assert "words.txt must hold four numbers" in said.stderr


def test_the_contract_is_told_whole() -> None:
    table = TEXT.partition("## An example")[0]
    told = set(re.findall(r"`(\w+)(?:\([^)]*\))?`", table))
    contract = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    assert contract - told - {"name"} == set()
    named = set(re.findall(r"\(`(seed.*?)`, …\)", table)[0].split("`, `"))
    assert named <= set(Settings.__dataclass_fields__)
