"""The command line that the benchmarks share, and how they hand out their figures."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from driver import Settings
from results import RESULTS, save, stamped
from workloads import PRECISIONS, STANDARD, WORKLOADS, Workload


def parser(
    description: str | None,
    *,
    models: Sequence[str] = STANDARD,
    rounds: int = 7,
    precisions: Sequence[str] = PRECISIONS,
) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = made.add_argument
    add("--models", default=",".join(models), help=f"comma-separated, of {', '.join(WORKLOADS)} (default %(default)s)")
    add("--precisions", default=",".join(precisions), help="comma-separated (default %(default)s)")
    add("--peers", default="", help="measure only these peers, comma-separated (names as in the figures)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 2), help="per peer (default %(default)s)")
    add("--rounds", type=int, default=rounds, help="alternations that count (default %(default)s)")
    add("--start-limit", type=float, default=300.0, help="seconds a peer may take to be ready (default %(default)s)")
    add("--jax", metavar="VENV", help="virtual environment (or interpreter) with jax: adds jax.jit")
    add("--tf", metavar="VENV", help="virtual environment (or interpreter) with tensorflow: adds tf.function")
    add("--json", action="store_true", help="print the JSON lines alone, without the table")
    add("--save", action="store_true", help=f"keep the figures in {RESULTS}")
    return made


def workloads_of(arguments: argparse.Namespace) -> list[Workload]:
    """The chosen workloads. Exits with the known names for an unknown one."""
    return [WORKLOADS[name] for name in _chosen(arguments.models, list(WORKLOADS), "model")]


def precisions_of(arguments: argparse.Namespace) -> list[str]:
    """The chosen precisions."""
    return _chosen(arguments.precisions, list(PRECISIONS), "precision")


def peers_of(arguments: argparse.Namespace) -> list[str]:
    """The chosen peers; empty for all."""
    return [name for name in arguments.peers.split(",") if name]


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    """How to measure."""
    return Settings(threads=arguments.threads, rounds=arguments.rounds, start_limit_s=arguments.start_limit, **more)


def publish(figures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print each figure as one JSON line, with date and machine."""
    found = []
    for figure in figures:
        found.append(rounded(stamped(figure)))
        print(json.dumps(found[-1]), flush=True)
    return found


def finish(benchmark: str, figures: list[dict[str, Any]], text: str, arguments: argparse.Namespace) -> int:
    """Print the table, keep the figures if asked to, and return the exit status: 1 when losses disagree or one of our
    own peers failed."""
    if not arguments.json:
        print("\n" + text)
    if arguments.save:
        save(benchmark, figures)
    wrong = [figure["name"] for figure in figures if not figure.get("losses_agree", True)]
    ours = sorted(
        {f"{n}: {why}" for f in figures for n, why in f.get("failed", {}).items() if n.startswith("millrace")}
    )
    for line in [*(f"losses disagree: {name}" for name in wrong), *(f"failed: {line}" for line in ours)]:
        print(line)
    return 1 if wrong or ours else 0


def rounded(value: Any) -> Any:
    """Floats to five significant digits, which is more than a timing holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def _chosen(text: str, known: list[str], what: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"no {what} is called {', '.join(unknown) or text!r}; there are {', '.join(known)}")
    return names
