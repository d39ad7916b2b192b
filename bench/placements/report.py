"""The report as Markdown, from the results of all cases."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.placements.cases import LEARNING, QUICK, ExactSettings, Settings

Case = Mapping[str, Any]
WANTED_GAIN, WANTED_GAP = 1.2, 0.05
ALGORITHMS = (*QUICK, *LEARNING, "auto")


def speedup(case: Case, name: str) -> float | None:
    """How many times as fast as `expert` an algorithm's plan is; None where one of them found none."""
    ours, hands = (case["algorithms"][n]["step_s"] for n in (name, "expert"))
    return hands / ours if ours and hands else None


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def counted(cases: Iterable[Case]) -> list[Case]:
    """The unequal and the branchy cases: devices differ, or the graph has work that can go on side by side."""
    return [case for case in cases if case["unequal"] or case["branchy"]]


def slower_than_expert(cases: Iterable[Case]) -> list[str]:
    """The cases in which auto is."""
    return [case["name"] for case in cases if (speedup(case, "auto") or 0.0) < 1 - 1e-9 and _hands(case)]


def text(cases: Sequence[Case], command: str) -> str:
    """The whole document."""
    parts = [_head(cases, command), _verdict(cases), _speedups(cases), _bounds(cases), _exact(cases)]
    parts += [_pipelines(cases), _learning(cases), _planning(cases)]
    return "\n\n".join(parts) + "\n"


def _head(cases: Sequence[Case], command: str) -> str:
    settings = Settings(**cases[0]["settings"])
    graphs = {case["graph"]: case for case in cases}
    rows = [
        (g, c["what"], str(c["microbatches"]), "yes" if c["branchy"] else "", f"{c['nodes']:,}", f"{c['trace_s']:.0f}")
        for g, c in graphs.items()
    ]
    return f"""# Placements compared

Written by `{command}` from simulated steps; nothing was run. Operators cost what the makers' data
sheets say (`place/presets.py`), in float32. Clusters are in `bench/placements/clusters`: four equal GPUs with fast
links, the same with slow links, two fast and two slow GPUs, and a GPU of 6 GiB beside a CPU with memory for everything.
`auto` had {settings.auto_s:g} s, `local_search` and `policy_gradient` {settings.search_s:g} s each.

{table(("graph", "what", "microbatches", "branchy", "nodes", "tracing, s"), rows)}"""


def _verdict(cases: Sequence[Case]) -> str:
    some = counted(cases)
    gains = [gain for case in some if (gain := speedup(case, "auto"))]
    slower = slower_than_expert(cases)
    gaps = [gap for case in cases if (gap := _gap(case)) is not None]
    mean = geometric_mean(gains)
    far = sum(gap > WANTED_GAP for gap in gaps)
    return f"""## In short

- `auto` is {mean:.2f} times as fast as `expert` in the geometric mean over the {len(gains)} unequal and branchy cases
  (wanted: {WANTED_GAIN}); {geometric_mean(g for c in cases if (g := speedup(c, "auto"))):.2f} over all {len(cases)}.
- Slower than `expert`: {", ".join(slower) or "in no case"}.
- Against the bound of the integer program (known in {len(gaps)} cases, below): at most
  {max(gaps, default=math.nan):.1%} above it, {statistics.median(gaps) if gaps else math.nan:.1%} in the median;
  {far} cases above {WANTED_GAP:.0%}.
- Planned in {max(c["algorithms"]["auto"]["planning_s"] for c in cases):.0f} s at most, after
  {max(c["prepare_s"] for c in cases):.0f} s at most for grouping nodes and working out costs."""


def _speedups(cases: Sequence[Case]) -> str:
    def cell(case: Case, name: str) -> str:
        value = speedup(case, name)
        if value is None:
            return "does not fit" if not case["algorithms"][name]["fits"] else "fits"
        apart = " †" if case["algorithms"][name].get("states_apart") else ""
        return f"**{value:.2f}**{apart}" if name == "auto" else f"{value:.2f}"

    names = [name for name in ALGORITHMS if name != "expert"]
    rows = [
        (c["name"] + (" *" if c["unequal"] or c["branchy"] else ""), _milliseconds(c), *(cell(c, n) for n in names))
        for c in cases
    ]
    means = [geometric_mean(v for c in counted(cases) if (v := speedup(c, n))) for n in names]
    rows.append(("geometric mean of * (where it fits)", "", *(f"{mean:.2f}" for mean in means)))
    return f"""## Times as fast as `expert`

`expert` in milliseconds a step; the others as its time over theirs, so more is better. * counts in the geometric mean.
† has variables and updates apart from their modules, which only `auto` tries, and only where fast devices lack memory.

{table(("case", "expert, ms", *names), rows)}"""


def _bounds(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        auto_s = case["algorithms"]["auto"]["step_s"]
        above = f"{auto_s / case['bound_s'] - 1:.0%}" if auto_s else ""
        rows.append((case["name"], str(case["groups"]), str(case["tasks"]), f"{1e3 * case['bound_s']:.4g}", above))
    return f"""## How far from a bound, with microbatches

The bound is weak: the longest way through the tasks without any transfer, or the work and the variables divided over
the devices at will, whichever is longer. The optimum lies somewhere between.

{table(("case", "groups", "tasks", "bound, ms", "auto above it"), rows)}"""


def _exact(cases: Sequence[Case]) -> str:
    rows = []
    for case in (case for case in cases if "exact" in case):
        found, gap = case["exact"], _gap(case)
        rows.append(
            (
                case["name"],
                f"{found['groups']} / {found['tasks']}",
                f"{1e3 * found['auto_s']:.4g}" if found["auto_s"] else "does not fit",
                f"{1e3 * found['exact_s']:.4g}" if found["exact_s"] else "none",
                f"{1e3 * found['bound_s']:.4g}" if gap is not None else "none",
                "yes" if found["proved"] else "",
                f"{gap:.1%}" if gap is not None else "",
            )
        )
    head = ("case", "groups / tasks", "auto, ms", "exact, ms", "bound, ms", "proved", "auto above the bound")
    settings = next((ExactSettings(**case["exact"]["settings"]) for case in cases if "exact" in case), ExactSettings())
    return f"""## Against the integer program

One microbatch alone, in at most {settings.groups} groups, which is what the integer program can take;
{settings.search_s:g} s for each. A bound is proved, whether or not a plan that reaches it was found in time. Where none
is given, nothing fits, or there was not the time for any bound. The LSTM has too many tasks.

{table(head, rows)}"""


def _pipelines(cases: Sequence[Case]) -> str:
    rows, gains = [], []
    for case in cases:
        times = [case["algorithms"][n]["step_s"] for n in ("pipeline", "interleaved")]
        if case["microbatches"] == 1 or not case["orders"]:
            continue
        if all(times):
            gains.append(times[0] / times[1])
        gpipe, turns = case["orders"]["gpipe"], case["orders"]["1f1b"]
        rows.append(
            (
                case["name"],
                f"{times[0] / times[1]:.2f}" if all(times) else "",
                *(f"{1e3 * o['step_s']:.4g} ms, {o['peak_bytes'] / 1e9:.1f} GB" for o in (gpipe, turns)),
            )
        )
    paid = sum(gain > 1 for gain in gains)
    return f"""## Pipelines: interleaved, GPipe, 1F1B

Several ranges a device (`interleaved`) are faster than one (`pipeline`) in {paid} of {len(gains)} cases where both
fit, at most {max(gains, default=math.nan):.2f} times as fast, {geometric_mean(gains):.2f} in the geometric mean: it is
among the candidates, and not instead of the other. The two orders are those of the placement of `pipeline`.

{table(("case", "interleaved against pipeline", "GPipe", "1F1B"), rows)}"""


def _learning(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        own = []
        for name in LEARNING:
            found = case["algorithms"][name]
            own += [
                f"{1e3 * found['step_s']:.4g}" if found["step_s"] else "none that fits",
                f"{found.get('tried') or ''}",
            ]
        rows.append((case["name"], *own))
    ratios = [
        case["algorithms"]["policy_gradient"]["step_s"] / case["algorithms"]["local_search"]["step_s"]
        for case in cases
        if all(case["algorithms"][n]["step_s"] for n in LEARNING)
    ]
    head = ("case", "local_search, ms", "plans tried", "policy_gradient, ms", "plans tried")
    return f"""## Local search and policy gradient in the same time

Both are rewarded with the simulated time of a step. The policy learns from nothing, the local search begins with what
the quick algorithms found; steps planned by the policy take {geometric_mean(ratios):.2f} times as long in the geometric
mean.

{table(head, rows)}"""


def _planning(cases: Sequence[Case]) -> str:
    rows = [
        (
            name,
            *(f"{pick([c['algorithms'][name]['planning_s'] for c in cases]):.2f}" for pick in (statistics.median, max)),
        )
        for name in ALGORITHMS
    ]
    return f"## Planning time\n\n{table(('algorithm', 'median, s', 'longest, s'), rows)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    line: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def _gap(case: Case) -> float | None:
    """What auto's plan for one microbatch is above the proved bound; None where there is no bound."""
    found = case.get("exact", {})
    return max(found["auto_s"] / found["bound_s"] - 1, 0.0) if found.get("auto_s") and found.get("bound_s") else None


def _hands(case: Case) -> bool:
    return case["algorithms"]["expert"]["step_s"] is not None


def _milliseconds(case: Case) -> str:
    hands_s = case["algorithms"]["expert"]["step_s"]
    return f"{1e3 * hands_s:.4g}" if hands_s else "does not fit"
