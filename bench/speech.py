"""python -m bench.speech: what the data factory buys: word errors at each distance from the noise, with it and without.

    python -m bench.speech                                  # two runs with the defaults, factory=true and =false
    python -m bench.speech --runs runs/with runs/without    # or two runs that are there

Keeps the figures in bench/results/speech.json, and writes the table of docs/zoo/speech.md and the picture beside it.
Prints one JSON line per run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.charts import line_chart
from bench.readme import between
from bench.results import RESULTS

KEPT = RESULTS / "speech.json"
PAGE = RESULTS.parent.parent / "docs" / "zoo" / "speech.md"
CONDITIONS = ("clean", "20db", "10db", "5db", "0db")
NAMES = {"true": "with the factory", "false": "without"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train twice, or take two runs, and write down what they reached."""
    options = argparse.ArgumentParser(prog="python -m bench.speech", description=__doc__)
    options.add_argument("--runs", nargs=2, type=Path, metavar=("WITH", "WITHOUT"), help="directories of finished runs")
    given = options.parse_args(arguments)
    kept: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
        runs = given.runs or [Path(directory) / factory for factory in NAMES]
        for factory, run in zip(NAMES, runs, strict=True):
            if not given.runs:
                command = [sys.executable, "-m", "millrace", "train", "speech", "--set", f"factory={factory}"]
                subprocess.run([*command, "--run-dir", str(run)], check=True, stdout=subprocess.DEVNULL)
            kept[factory] = figure(run, factory)
            print(json.dumps({"factory": factory, **kept[factory]}), flush=True)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), table(kept)), encoding="utf-8")
    PAGE.with_suffix(".svg").write_text(chart(kept), encoding="utf-8")
    return 0


def figure(run: Path, factory: str) -> dict[str, Any]:
    """What a finished run reached. Raises ValueError where it is another one than asked for."""
    result = json.loads((run / "result.json").read_text())
    settings = json.loads((run / "config.json").read_text())["settings"]
    if result["task"] != "speech" or str(settings["factory"]).lower() != factory:
        raise ValueError(f"{run} is a run of {result['task']} with factory={settings.get('factory')}, not {factory}")
    errors = {name: round(result[f"test_word_error_{name}"], 4) for name in CONDITIONS}
    return {"steps": result["steps"], "errors": errors}


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Word errors as Markdown."""
    steps = {figure["steps"] for figure in kept.values()}
    rows = [
        ["word error", "clean", *(f"{name.removesuffix('db')} dB" for name in CONDITIONS[1:])],
        ["---", *["---:"] * len(CONDITIONS)],
        *([NAMES[f], *(f"{kept[f]['errors'][name]:.1%}" for name in CONDITIONS)] for f in kept),
    ]
    note = f"Written by `python -m bench.speech`: a run each, of {' and '.join(map(str, sorted(steps)))} steps."
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}"


def chart(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Word error over the distance from the noise."""
    lines = {
        NAMES[factory]: [
            (float(name.removesuffix("db")), 100 * figure["errors"][name]) for name in reversed(CONDITIONS[1:])
        ]
        for factory, figure in kept.items()
    }
    title = "Speech in noise: wrong words of unseen speakers"
    return line_chart(title, "speech over noise, dB", "word error, %", lines, log=False)


if __name__ == "__main__":
    sys.exit(main())
