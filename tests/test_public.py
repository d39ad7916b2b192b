"""The names that millrace promises, what they say of themselves, and that having them costs little."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
from tests.small import run_program

import millrace
import millrace.data
import millrace.graph
import millrace.optim
from millrace.train.plan import Plan, PlanSettings

PUBLIC = {
    "Callback", "Checkpoints", "EarlyStopping", "Estimator", "Evaluator", "Graph", "MillraceError", "Model", "Result",
    "RunDirectory", "Session", "__version__", "colocate", "cond", "data", "device", "errors", "evaluation_graph", "fit",
    "graph", "load_graph", "load_weights", "map_", "optim", "save_graph", "save_weights", "scan", "trace",
    "training_graph",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(millrace.__all__) == PUBLIC
    assert len(PUBLIC) <= 40
    assert millrace.__all__ == sorted(millrace.__all__)


@pytest.mark.parametrize("room", [millrace, millrace.data, millrace.graph, millrace.optim])
def test_every_public_thing_is_there_and_says_what_it_is_for(room: object) -> None:
    assert inspect.getdoc(room)
    for name in room.__all__:  # type: ignore[attr-defined]
        thing = getattr(room, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
        if not inspect.isclass(thing):
            continue
        for method, found in inspect.getmembers(thing, inspect.isfunction):
            own = found.__module__.startswith("millrace") and not method.startswith("_")
            assert not own or inspect.getdoc(found), f"{name}.{method} has no docstring"


def test_what_is_public_is_annotated() -> None:
    for name in millrace.__all__:
        thing = getattr(millrace, name)
        if inspect.isfunction(thing):
            missing = [p for p in inspect.signature(thing).parameters.values() if p.annotation is p.empty]
            assert missing == [], name
            assert inspect.signature(thing).return_annotation is not inspect.Signature.empty, name


def test_fit_takes_every_setting_of_a_plan_by_name() -> None:
    assert list(PlanSettings.__annotations__) == [field.name for field in fields(Plan)]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The top-level and some deeper modules that an import brings, in a fresh process."""
    code = """
import json, sys
found = {}
import millrace.errors, millrace.cli.main
found["cli"] = sorted(sys.modules)
import torch
before = set(sys.modules)
import millrace
found["millrace"] = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""
    done = run_program(code, cwd=Path(tmp_path_factory.mktemp("import")))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "heavy",
    ["ray", "tensorflow", "jax", "sklearn", "scipy", "pandas", "matplotlib", "transformers", "datasets", "timm",
     "torchvision", "torchdata", "torch._inductor.codecache", "torch._inductor.compile_fx", "triton"],
)  # fmt: skip
def test_importing_millrace_brings_nothing_heavy(heavy: str, imported: dict[str, list[str]]) -> None:
    assert heavy not in imported["millrace"]
    assert not any(name.startswith(heavy + ".") for name in imported["millrace"])
