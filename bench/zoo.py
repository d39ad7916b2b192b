"""python -m bench.zoo: what every task of the zoo reaches, and how fast its steps are against a plain eager loop.

    python -m bench.zoo                     # all of them; or those that are named
    python -m bench.zoo words cat --train-only

A task is trained with its defaults in a directory of its own and evaluated on its test data; then steps of the same
model on the same batches are timed: Millrace's compiled ones, and a plain PyTorch loop (forward, backward, AdamW, no
compiler; Adagrad where gradients are sparse), in turn. Each task's figures are kept in bench/results/zoo.json, and the
table of docs/zoo/README.md is written from all that is kept there. Prints one JSON line per task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.readme import between
from bench.results import RESULTS
from millrace.graph.training import training_graph
from millrace.runtime.session import Session
from millrace.zoo.registry import load, summaries
from millrace.zoo.run import total_steps

KEPT = RESULTS / "zoo.json"
PAGE = RESULTS.parent.parent / "docs" / "zoo" / "README.md"
ROUNDS, TURN_S = 7, 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tasks that are named. Exit status: 1 when one misses its bar."""
    options = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    options.add_argument("tasks", nargs="*", metavar="TASK", help="of `millrace tasks` (default: all)")
    options.add_argument("--train-only", action="store_true", help="leave the race against the eager loop out")
    options.add_argument("--race-only", action="store_true", help="leave the training out")
    options.add_argument("--runs", type=Path, default=None, metavar="DIR", help="keep the trained runs there, by task")
    options.add_argument("--no-save", action="store_true", help="only look")
    given = options.parse_args(arguments)
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    missed = False
    for name in given.tasks or summaries():
        figure = dict(kept.get(name, {}))
        if not given.race_only:
            figure |= trained(name, given.runs)
        if not given.train_only:
            figure |= race(name)
        print(json.dumps({"task": name, **figure}), flush=True)
        missed |= figure.get("reached", True) is False
        kept[name] = figure
        if not given.no_save:
            KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
            PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), table(kept)), encoding="utf-8")
    return int(missed)


def trained(name: str, runs: Path | None) -> dict[str, Any]:
    """Train a task with its defaults, as a user does. runs: where its run is kept, under its name."""
    kind = load(name)
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
        run = str((runs or Path(directory)).resolve() / name)
        command = [sys.executable, "-m", "millrace", "train", name, "--json", "--run-dir", run]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=directory)
    result = json.loads(said.stdout.splitlines()[-1])
    value = float(result[f"test_{kind.metric}"])
    reached = None if kind.bar is None else (value >= kind.bar if kind.better == "max" else value <= kind.bar)
    source = Path(sys.modules[kind.__module__].__file__ or "")
    return {
        "metric": kind.metric,
        "better": kind.better,
        "bar": kind.bar,
        "value": round(value, 4),
        "reached": reached,
        "seconds": round(float(result["train_s"]), 1),
        "steps": result["steps"],
        "lines": len(source.read_text(encoding="utf-8").splitlines()),
    }


def race(name: str) -> dict[str, Any]:
    """Examples per second of compiled steps and of a plain eager loop, in turn over the same batches."""
    settings = load(name).settings_type()
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    task = load(name)(settings)
    data = task.data()
    torch.manual_seed(settings.seed)
    model, own = task.model(data.facts), task.model(data.facts)
    own.load_state_dict(model.state_dict())
    batches = list(itertools.islice(iter(data.train), 8))
    data.train.close()
    examples = len(next(leaf for leaf in torch.utils._pytree.tree_leaves(batches[0]) if isinstance(leaf, Tensor)))
    graph = training_graph(model.train(), task.loss, task.optimizer(model, total_steps(settings, data)), batches[0])
    session = Session(graph, compile="inductor", copy=True)
    sparse = any(getattr(module, "sparse", False) for module in own.modules())  # of which AdamW would take no gradient
    rule = (torch.optim.Adagrad if sparse else torch.optim.AdamW)(own.train().parameters(), lr=1e-4)

    def eager(batch: Any) -> None:
        rule.zero_grad()
        task.loss(own, batch)[0].backward()
        rule.step()

    ways: dict[str, Callable[[Any], Any]] = {
        "millrace": lambda batch: session.run(["train", "loss"], batch),
        "eager": eager,
    }
    counts = {way: _steps_of_a_turn(step, batches) for way, step in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, step in ways.items():
            begin = time.perf_counter()
            for index in range(counts[way]):
                step(batches[index % len(batches)])
            seconds[way].append((time.perf_counter() - begin) / counts[way])
    session.close()
    ratio = statistics.median(e / m for e, m in zip(seconds["eager"], seconds["millrace"], strict=True))
    return {
        "examples_per_s": round(examples / statistics.median(seconds["millrace"]), 1),
        "times_eager": round(ratio, 2),
    }


def _steps_of_a_turn(step: Callable[[Any], Any], batches: Sequence[Any]) -> int:
    for batch in batches[:2]:
        step(batch)
    begin = time.perf_counter()
    step(batches[0])
    return max(1, round(TURN_S / (time.perf_counter() - begin)))


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Every task with what it reaches, as Markdown."""
    rows = [
        ["task", "measured", "bar", "reached", "lines", "training", "examples/s", "times a plain eager loop"],
        ["---", "---", "---:", "---:", "---:", "---:", "---:", "---:"],
    ]
    for name, f in sorted(kept.items()):
        if "value" not in f:
            continue
        bar = "" if f["bar"] is None else f"{'≥' if f['better'] == 'max' else '≤'} {f['bar']:g}"
        value = f"{f['value']:g}" + ("" if f["reached"] is not False else " (missed)")
        page = f"[{name}]({name}.md)" if (PAGE.parent / f"{name}.md").exists() else name
        speed = [f"{f['examples_per_s']:g}", f"{f['times_eager']:.2f}×"] if "times_eager" in f else ["", ""]
        rows.append([page, f["metric"], bar, value, str(f["lines"]), f"{f['seconds']:.0f} s", *speed])
    note = "Written by `python -m bench.zoo`; 2 cores without a GPU, other programs at times."
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}"


if __name__ == "__main__":
    sys.exit(main())
