"""Writes the table of figures into README.md, from the results that the benchmarks kept with --save.

python bench/readme.py [--results DIR] [--readme FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import times
from results import RESULTS, read
from workloads import WORKLOADS

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
README = RESULTS.parent.parent / "README.md"
Figure = dict[str, Any]
_TITLES = {
    "eager": "eager",
    "eager_fused": "eager, fused optimizer",
    "compile": "`torch.compile`",
    "compile_fused": "`torch.compile`, fused optimizer",
    "compile_graphs": "`torch.compile`, CUDA graphs",
    "jax": "`jax.jit`",
    "tf": "`tf.function`",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--results", type=Path, default=RESULTS, help="directory of results (default %(default)s)")
    options.add_argument("--readme", type=Path, default=README, help="file to write into (default %(default)s)")
    chosen = options.parse_args(arguments)
    results = {name: read(chosen.results / f"{name}.jsonl") for name in ("step_time", "first_step", "memory", "gpu")}
    if not any(results.values()):
        print(f"no results in {chosen.results}: run the benchmarks with --save first", file=sys.stderr)
        return 1
    try:
        text = between(chosen.readme.read_text(), section(results))
    except (OSError, ValueError) as error:
        print(f"{chosen.readme}: {error}", file=sys.stderr)
        return 1
    chosen.readme.write_text(text)
    print(f"wrote the figures of {sum(map(len, results.values()))} results into {chosen.readme}")
    return 0


def between(text: str, new: str) -> str:
    """`text` with what stands between the two markers replaced. Raises ValueError without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, each once")
    return text.partition(BEGIN)[0] + f"{BEGIN}\n\n{new}\n\n{END}" + text.partition(END)[2]


def section(results: dict[str, list[Figure]]) -> str:
    """All tables, each with where and when it was measured."""
    gpu = {
        kind: [f for f in results["gpu"] if f["name"].startswith(f"gpu_{kind}/")] for kind in ("step_time", "memory")
    }
    parts = [
        _step_time("Step time", results["step_time"]),
        _first_step(results["first_step"]),
        _memory("Peak memory while stepping", results["memory"]),
        _step_time("Step time on a GPU", gpu["step_time"]),
        _memory("Peak GPU memory while stepping", gpu["memory"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _step_time(title: str, figures: Sequence[Figure]) -> str:
    columns = [name for name in _TITLES if any(name in f["ratios"] for f in figures)]
    rows = [
        [_what(f), f["precision"], f"**{times(f['ratio'])}**", *(times(f["ratios"].get(name)) for name in columns)]
        for f in _ordered(figures)
    ]
    header = ["model", "precision", "best of PyTorch", *(_TITLES[name] for name in columns)]
    note = "how many times as fast a step is as each peer's; medians of ratios from one round, peers in turn."
    return _part(title, note, header, rows, figures)


def _first_step(figures: Sequence[Figure]) -> str:
    columns = [name for name in _TITLES if any(name in f["ratios"] for f in figures)]
    rows = [
        [_what(f), f"**{f['seconds']:.1f} s**", *(_seconds(f["peers"].get(name)) for name in columns)]
        for f in _ordered(figures)
    ]
    note = "seconds from the call of `fit` to the end of the first step, in a fresh process with cold caches."
    return _part("First step", note, ["model", "`millrace.fit`", *(_TITLES[name] for name in columns)], rows, figures)


def _memory(title: str, figures: Sequence[Figure]) -> str:
    columns = [name for name in _TITLES if any(name in f["ratios"] for f in figures)]
    rows = [
        [_what(f), f["precision"], *(f"{f['ratios'][name]:.2f}" if name in f["ratios"] else "-" for name in columns)]
        for f in _ordered(figures)
    ]
    note = "ours over each peer's, above what the process holds after its imports; below 1 is less."
    return _part(title, note, ["model", "precision", *(_TITLES[name] for name in columns)], rows, figures)


def _part(
    title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]], figures: Sequence[Figure]
) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return f"**{title}**: {note}\n\n" + "\n".join(lines) + f"\n\n{_where(figures)}"


def _where(figures: Sequence[Figure]) -> str:
    """Machines, dates and versions of these figures, in a line."""
    machines = sorted({f"{f['machine']}, {f['threads']} threads" for f in figures})
    dates = sorted({f["date"][:10] for f in figures})
    versions: dict[str, str] = {}
    for figure in figures:
        versions |= figure["versions"]
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(machines)}; {days}; " + ", ".join(f"{name} {number}" for name, number in versions.items())


def _what(figure: Figure) -> str:
    """The model, and in which way we ran it."""
    ways = {"millrace_eager": " (eager tier)", "millrace_tiered": " (tiered)"}
    way = figure["name"].rpartition("/")[2]
    if way.startswith("millrace_x"):
        return f"{figure['workload']}, {way.removeprefix('millrace_x')} steps per call"
    return figure["workload"] + ways.get(way, "")


def _ordered(figures: Sequence[Figure]) -> list[Figure]:
    """By workload as they are listed, then by precision, then by name; a figure whose losses disagree is left out."""
    order = list(WORKLOADS)
    good = [f for f in figures if f["losses_agree"]]
    return sorted(good, key=lambda f: (order.index(f["name"].split("/")[1]), f["precision"] != "float32", f["name"]))


def _seconds(peer: Figure | None) -> str:
    return "-" if peer is None else f"{peer['median']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
