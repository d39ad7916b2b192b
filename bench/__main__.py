"""python -m bench: step time, first step and memory against eager PyTorch, torch.compile and, where given, JAX and TF.

Prints one JSON line per figure and a table. A full run also keeps the figures in bench/results and writes the table of
README.md from all that is kept there; --quick and --no-save only look.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.catalogue import first_step_peers, select, step_peers
from bench.figures import first_step_figure, rounded, step_figure
from bench.first_step import first_steps
from bench.race import Settings, race, say
from bench.readme import between, plain, section, tables
from bench.results import RESULTS, read, save, stamped
from bench.workloads import PRECISIONS, STANDARD, WORKLOADS, Workload

README = RESULTS.parent.parent / "README.md"
KINDS = ("step", "first_step")
NO_GPU = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for. Exit status: 0; 1 when losses disagree or Millrace failed; 3 without a GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(given)
    keep = chosen.save and not chosen.quick
    if chosen.table:
        return _write_readme()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false, so there is nothing to measure")
        return NO_GPU
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as cache:
        for figure in _measure(chosen, _settings(chosen, Path(cache))):
            figures.append(rounded(stamped(figure, ["python -m bench", *given])))
            print(json.dumps(figures[-1]), flush=True)
            if keep:
                save(figures[-1:], chosen.device)  # at once, so that an interrupted run loses no more than it must
    print("\n" + tables(figures, plain))
    if keep:
        _write_readme()
    return _verdict(figures)


def _measure(chosen: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """Every figure, as they come: first steps in float32 alone, as compiling takes as long in any precision."""
    precisions = chosen.precisions or (PRECISIONS[:1] if chosen.quick else PRECISIONS)
    for workload in _workloads(chosen):
        here = replace(settings, cache=settings.cache / workload.name)
        if "first_step" in chosen.kinds and not workload.large:
            peers = select(first_step_peers(jax=chosen.jax, tf=chosen.tf), chosen.peers)
            yield first_step_figure(first_steps(workload, "float32", peers, replace(here, rounds=min(here.rounds, 3))))
        if "step" in chosen.kinds:
            for precision in ("bfloat16",) if workload.large else precisions:
                peers = step_peers(workload, jax=chosen.jax, tf=chosen.tf, device=chosen.device)
                yield step_figure(race(workload, precision, select(peers, chosen.peers), here))


def _settings(chosen: argparse.Namespace, cache: Path) -> Settings:
    cuda = chosen.device.startswith("cuda")
    return Settings(
        cache,
        threads=chosen.threads or min(4 if cuda else 2, os.cpu_count() or 1),
        rounds=chosen.rounds or (2 if chosen.quick else 7),
        turn_s=chosen.turn or (0.05 if chosen.quick else 0.3),
        starts=4 if cuda else 2,
        device=chosen.device,
    )


def _workloads(chosen: argparse.Namespace) -> list[Workload]:
    names = chosen.models
    if not names:
        names = ["mlp"] if chosen.quick else [*STANDARD, *(["gpt2"] if chosen.device.startswith("cuda") else [])]
    return [WORKLOADS[name] for name in names]


def _write_readme() -> int:
    results = read()
    if not results:
        say(f"no results in {RESULTS}: nothing to write into {README.name}")
        return 1
    README.write_text(between(README.read_text(), section(results)))
    say(f"wrote the figures of {len(results)} machines into {README.name}")
    return 0


def _verdict(figures: Sequence[dict[str, Any]]) -> int:
    wrong = [f"losses disagree in {f['name']}: {', '.join(f['disagreeing'])}" for f in figures if f["disagreeing"]]
    failed = [(f["name"], peer, why) for f in figures for peer, why in f["failed"].items()]
    for line in [*wrong, *(f"failed in {name}: {peer}: {why}" for name, peer, why in failed)]:
        print(line)
    return 1 if wrong or any(peer.startswith(("millrace", "fit")) for _, peer, _ in failed) else 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition(": ")[2])
    add = made.add_argument
    add("--jax", metavar="VENV", help="virtual environment (or interpreter) with jax: adds jax.jit")
    add("--tf", metavar="VENV", help="virtual environment (or interpreter) with tensorflow: adds tf.function")
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    add("--quick", action="store_true", help="only see that it works: the tiny MLP, two short rounds, nothing kept")
    add("--models", type=_names(WORKLOADS), default=[], help=f"comma-separated, of {', '.join(WORKLOADS)}")
    add("--precisions", type=_names(PRECISIONS), default=[], help=f"comma-separated, of {', '.join(PRECISIONS)}")
    add("--kinds", type=_names(KINDS), default=list(KINDS), help="comma-separated, of step (and memory), first_step")
    add("--peers", type=_names(), default=[], help="only these, comma-separated: names as in the figures")
    add("--threads", type=int, help="of each peer (default 2; 4 beside a GPU)")
    add("--rounds", type=int, help="turns of each peer that count (default 7)")
    add("--turn", type=float, metavar="S", help="seconds of a turn (default 0.3)")
    add("--no-save", dest="save", action="store_false", help="keep nothing")
    add("--table", action="store_true", help="measure nothing, write README.md's table from what is kept")
    return made


def _names(known: Iterable[str] = ()) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        unknown = sorted(set(found) - set(known)) if known else []
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {text!r}")
        return found

    return names


if __name__ == "__main__":
    sys.exit(main())
