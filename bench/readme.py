"""Figures as tables: the ones in README.md, between the markers, and the one on the terminal. All pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.catalogue import FIT, FIT_WARM, GROUPS, MILLRACE, OURS
from bench.workloads import PRECISIONS, WORKLOADS

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
Figure = dict[str, Any]
Rows = list[list[str]]

_TITLES = {"eager": "eager", "compile": "`torch.compile`", "jax": "`jax.jit`", "tf": "`tf.function`"}


def between(text: str, new: str) -> str:
    """`text` with what stands between the two markers replaced. Raises ValueError without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, each once")
    return text.partition(BEGIN)[0] + f"{BEGIN}\n{new}\n{END}" + text.partition(END)[2]


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """Every machine's tables, each with where, when and with what it was measured."""
    return "\n\n".join(_machine(result["machine"], _ordered(result["figures"])) for result in results)


def tables(figures: Sequence[Figure], draw: Callable[[Rows], str]) -> str:
    """Three tables with their notes: step time, first step, memory; only those that there are figures for."""
    parts = [
        (
            "Step time: how many times as fast as the fastest variant of each peer (median of the rounds' ratios, and "
            "their quartiles).",
            step_rows(figures),
        ),
        (
            "Seconds to the end of the first step: of `fit` from its call, with an empty cache and on a second start; "
            "of the others without their imports.",
            first_step_rows(figures),
        ),
        (
            "Peak memory while stepping, in MiB above what the process held after its imports, and in brackets of the "
            "whole process; on a GPU, device memory.",
            memory_rows(figures),
        ),
    ]
    return "\n\n".join(f"{note}\n\n{draw(rows)}" for note, rows in parts if len(rows) > 1)


def step_rows(figures: Sequence[Figure]) -> Rows:
    """One row for each workload, precision and way of ours; first the header."""
    measured = [f for f in figures if f["kind"] == "step" and f["ratios"]]
    groups = [g for g in GROUPS if any(g in ratios for f in measured for ratios in f["ratios"].values())]
    rows = [["model", "precision", *(_TITLES[g] for g in groups)]]
    for figure in measured:
        for way, ratios in figure["ratios"].items():
            steps = way.removeprefix(MILLRACE.name).removeprefix("_x")
            title = figure["title"] + (f", {steps} steps per call" if steps else "")
            rows.append([title, figure["precision"], *(times(ratios.get(g)) for g in groups)])
    return rows


def first_step_rows(figures: Sequence[Figure]) -> Rows:
    """One row for each workload; first the header."""
    measured = [f for f in figures if f["kind"] == "first_step"]
    titles = {FIT.name: "`fit`", FIT_WARM.name: "`fit` again", **_TITLES}
    columns = [name for name in titles if any(name in f["peers"] for f in measured)]
    rows = [["model", *(titles[name] for name in columns)]]
    for figure in measured:
        seconds = (figure["peers"].get(name) for name in columns)
        rows.append([figure["title"], *(f"{s['median']:.2f}" if s else "-" for s in seconds)])
    return rows


def memory_rows(figures: Sequence[Figure]) -> Rows:
    """One row for each workload and precision, of the variants that step times are compared with; first the header."""
    measured = [f for f in figures if f["kind"] == "step" and MILLRACE.name in f["ratios"]]
    chosen = [
        {OURS: MILLRACE.name} | {group: ratio["variant"] for group, ratio in f["ratios"][MILLRACE.name].items()}
        for f in measured
    ]
    titles = {OURS: "millrace", **_TITLES}
    groups = [group for group in titles if any(group in variants for variants in chosen)]
    rows = [["model", "precision", *(titles[group] for group in groups)]]
    for figure, variants in zip(measured, chosen, strict=True):
        rows.append([figure["title"], figure["precision"], *(_memory(figure, variants.get(g, "")) for g in groups)])
    return rows


def markdown(rows: Rows) -> str:
    """A table for README.md."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def plain(rows: Rows) -> str:
    """A table for a terminal: columns as wide as their widest cell; the first on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def times(ratio: Mapping[str, Any] | None) -> str:
    """A ratio for people: "1.23× (1.20-1.27)"."""
    if ratio is None or math.isnan(ratio["median"]):
        return "-"
    return f"{ratio['median']:.2f}× ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _machine(machine: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    dates = sorted({f["date"][:10] for f in figures})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = "/".join(sorted({str(f["threads"]) for f in figures}))
    versions = {name: number for figure in figures for name, number in figure["versions"].items()}
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    wrong = sorted({f"{f['name']} ({', '.join(f['disagreeing'])})" for f in figures if f["disagreeing"]})
    note = f"Losses disagree, and so the work: {'; '.join(wrong)}." if wrong else "The losses of all peers agree."
    where = f"Measured on {machine['name']}, {threads} thread(s), {days}, with {used}. {note}"
    return f"{where}\n\n{tables(figures, markdown)}"


def _memory(figure: Figure, name: str) -> str:
    memory = figure["peers"].get(name, {}).get("memory")
    if not memory:
        return "-"
    mib = f"{memory['steps_bytes'] / 2**20:.0f}"
    return mib if figure["device"].startswith("cuda") else f"{mib} ({memory['total_bytes'] / 2**20:.0f})"


def _ordered(figures: Sequence[Figure]) -> list[Figure]:
    """By workload as they are listed, then by precision."""
    return sorted(figures, key=lambda f: (list(WORKLOADS).index(f["workload"]), PRECISIONS.index(f["precision"])))
