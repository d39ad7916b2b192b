"""The page about simulated scaling, and its pictures, from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.charts import line_chart
from bench.scale_paper import PUBLISHED, SERVERS, WORKERS

_ABOUT = """# Many workers, simulated

Written by `python -m bench.scale`; nothing on this page ran on more than one machine. Up to 1,024 workers were
simulated (`src/millrace/replicas/scale/`), with what a step costs as measured on {machine}. All figures are in
`bench/results/scale/scale.json`.

## What is simulated

- Every machine has one network card, full duplex, behind a switch that is never full. Transfers share the cards of
  servers **max-min fairly**, none faster than a worker's own card. Variables are spread evenly over all servers.
- A worker computes, pushes, waits, fetches. {overlap}
- A server takes a push whole and then works on it, one after the other: it adds it up (synchronous) or applies it.
- A ring all-reduce takes 2 (n - 1) rounds of an n-th of the bytes and one latency. In a hybrid, groups of 8 reduce in a
  ring; the group's first worker pushes the mean, fetches, and passes the variables on.
- Backup workers are one for 16. A gradient that comes late is still pushed, and dropped. Its worker then begins at once
  with the newest variables, or (*late wait*) idles until the next update.
- A computation is lognormal around its median with sigma 0.06. A machine pauses 0.0007 times per second of work; half
  of the pauses are longer than 0.7 s, few last minutes. Where these numbers come from is in `Stragglers` (`job.py`).
  Another reading of what was published has 13 times as many pauses: *heavy*. Papers were not all at hand in full;
  what is taken from Chen et al. 2016 should be checked before much is built on it.
- Rates are means, and the longest pauses decide the mean of synchronous steps: with heavy stragglers, another seed
  gives rates that differ by tens of percent. Medians of steps hardly move.
- The slow network is 1 Gbit/s and 100 µs, the fast one 100 Gbit/s and 5 µs; {message_us:.1f} µs are added for sending a
  message. There are {servers} servers where nothing else is said. Nobody dies; `simulate` takes `Failures`.

| job | computing, s | MB each way | examples a step |
|---|---|---|---|
{jobs}

`inception` is Inception-v3 on a GPU of 2013 (assumed: 1 s for 32 images). The two others are one thread of this
machine, forward and backward without compiling. A server is one thread of this machine: {sum_ns:.2f} ns per byte to
add a gradient up, {apply_ns:.2f} ns to apply it (AdamW). Other work ran on the machine; the least of five rounds
counts.
"""


_BESIDE = """## Beside published figures

The TensorFlow paper (OSDI 2016, section 6.3) trained Inception-v3 on K40 GPUs with {servers} servers. Network cards
here are those of its figure 6, transfers overlap with computing as in its dataflow, late workers begin at once.
Fitted: the time to apply a gradient, to {images:,.0f} images/s with 200 asynchronous workers (taking 32 images a
step, which the paper does not say); computing, to {step_s} s with {workers} workers and 4 backups; in the third case
also how slow the slow machines are, to {gain:.1f} % with 3 backups. *heavy*, *light*: as above. *slow machines*:
light, and 6 % of the machines (3 of 50) always slow. All else is outcome.
"""
_BACKUPS = """![normalized speedup](scale-backups.svg)

Median step and normalized speedup, t(0) / t(b) × 50 / (50 + b) - 1. Published: 1.93 s with 4 backups is the shortest,
+9.5 % with 3 the best, a fifth makes it slightly worse.
"""
_RATIOS = """Published: the median synchronous step is about 1.10 times the asynchronous one, and much longer above
the 90th percentile.
"""


def report(whole: dict[str, Any]) -> str:
    """The page as Markdown."""
    costs, cases = whole["costs"], whole["cases"]
    jobs = [
        ("inception", 1.0, 95.2e6, 32),
        *((n, costs[f"{n}_s"], costs[f"{n}_bytes"], costs[f"{n}_examples"]) for n in ("transformer", "digits")),
    ]
    parts = [
        _ABOUT.format(
            machine=whole["machine"]["name"],
            overlap="Fetching runs beside the forward pass, sending beside the backward pass."
            if "--overlap" in whole["command"]
            else "Nothing of that overlaps within a worker: what is hidden makes rates better.",
            message_us=costs["message_s"] * 1e6,
            servers=whole["servers"],
            sum_ns=costs["sum_s_per_byte"] * 1e9,
            apply_ns=costs["apply_s_per_byte"] * 1e9,
            jobs="\n".join(f"| {n} | {s:.3g} | {b / 1e6:.3g} | {e} |" for n, s, b, e in jobs),
        ),
        "## How many times as fast as one worker\n\nIn examples per second, against a worker that never waits.\n",
        _speedups(cases, {name: examples / seconds for name, seconds, _, examples in jobs}),
        "## Where each way saturates\n\nThe least number of workers from which twice as many bring less than 10 % more "
        f"examples per second;\n-: none up to half of the largest number. {whole['servers']} servers.\n",
        _saturation(cases),
        "## How many servers are needed\n\nFor 90 % of the rate that servers without limit would give, in runs of 20 "
        "to 40 steps.\n",
        _needed(cases),
        *(_case(name, case) for name, case in cases.items()),
    ]
    if whole["paper"]:
        parts.append(_paper(whole["paper"]))
    return "\n".join(parts)


def pictures(whole: dict[str, Any]) -> dict[str, str]:
    """SVG texts by file name."""
    found = {}
    for name in ("inception/slow", "inception/fast"):
        lines = {
            way: [(float(n), f["examples_per_s"]) for n, f in entry["by_workers"].items()]
            for way, entry in whole["cases"][name]["ways"].items()
        }
        title = f"Inception, {name.partition('/')[2]} network, {whole['servers']} servers"
        found[_file(name)] = line_chart(title, "workers", "examples per second", lines)
    if whole["paper"]:
        lines = {
            row["name"]: [(float(b), 100 * s) for b, s in enumerate(row["speedup_by_backups"])]
            for row in whole["paper"]
        }
        label = "normalized speedup, %"
        found["scale-backups.svg"] = line_chart("50 workers and backups", "backup workers", label, lines, log=False)
    return found


def _file(case: str) -> str:
    return f"scale-{case.replace('/', '-')}.svg"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _speedups(cases: dict[str, Any], alone: dict[str, float]) -> str:
    names = list(next(iter(cases.values()))["ways"])
    most = list(next(iter(next(iter(cases.values()))["ways"].values()))["by_workers"])[-1]
    rows = []
    for case, entry in cases.items():
        rates = [entry["ways"][way]["by_workers"][most]["examples_per_s"] for way in names]
        rows.append([case, *(f"{rate / alone[case.partition('/')[0]]:,.0f}" for rate in rates)])
    return _table([f"job / network, {most} workers", *names], rows)


def _saturation(cases: dict[str, Any]) -> str:
    names = list(next(iter(cases.values()))["ways"])
    rows = [[case, *(str(entry["ways"][way]["saturates_at"] or "-") for way in names)] for case, entry in cases.items()]
    return _table(["job / network", *names], rows)


def _needed(cases: dict[str, Any]) -> str:
    workers = list(next(iter(cases.values()))["servers_needed"]["servers"])
    rows = [
        [case, name, *(str(found[n] or "> 4096") for n in workers)]
        for case, entry in cases.items()
        for name, found in entry["servers_needed"].items()
    ]
    return _table(["job / network", "way", *(f"{n} workers" for n in workers)], rows)


def _case(name: str, case: dict[str, Any]) -> str:
    ways = case["ways"]
    workers = list(next(iter(ways.values()))["by_workers"])
    job, speed, *kind = name.split("/")
    rates = [[way, *(f"{e['by_workers'][n]['examples_per_s']:,.3g}" for n in workers)] for way, e in ways.items()]
    shown = [n for n in ("64", "1024") if n in workers] or workers[-1:]
    rows = []
    for way, entry in ways.items():
        for n in shown:
            f = entry["by_workers"][n]
            tau = f"{f['tau_mean']:.0f} ({f['tau_p50']}, {f['tau_p99']})" if f["tau_p99"] else "0"
            times = [f"{f[key]:.3g}" for key in ("step_s", "step_p90_s", "step_p99_s")]
            keys = ("server_in_share", "server_out_share", "server_work_share", "worker_share")
            dropped = f"{100 * f['dropped'] / (f['applied'] + f['dropped']):.1f}"
            rows.append([way, n, f"{f['steps_per_s']:.3g}", *times, tau, dropped, *(f"{100 * f[k]:.0f}" for k in keys)])
    head = ["way", "workers", "updates/s", "step median, s", "p90", "p99", "τ mean (median, p99)", "dropped, %"]
    shares = ["servers receive, %", "send, %", "work, %", "workers compute, %"]
    picture = f"![examples per second]({_file(name)})\n\n" if job == "inception" and not kind else ""
    return (
        f"## {job}, {speed} network{', heavy stragglers' if kind else ''}\n\n{picture}"
        + _table(["examples/s with … workers", *workers], rates)
        + "\n"
        + _table([*head, *shares], rows)
    )


def _paper(rows: list[dict[str, Any]]) -> str:
    fitted = [
        [
            row["name"],
            f"{row['compute_s']:.2f}",
            f"{row['apply_s_per_byte'] * 1e9:.2f}",
            f"{row['slow_factor']:.2f}",
        ]
        for row in rows
    ]
    backups = range(len(rows[0]["step_s_by_backups"]))
    gains = [[row["name"], *(f"{s:.2f} s, {100 * g:+.1f} %" for s, g in _both(row))] for row in rows]
    shape = [
        [
            row["name"],
            str(w["workers"]),
            f"{w['async_s']:.2f}",
            f"{w['sync_s']:.2f}",
            f"{w['sync_s'] / w['async_s']:.2f}",
            f"{w['sync_p90_s'] / w['async_p90_s']:.2f}",
            f"{w['async_images_per_s']:,.0f}",
            f"{w['sync_images_per_s']:,.0f}",
        ]
        for row in rows
        for w in row["by_workers"]
    ]
    head = [
        "stragglers",
        "workers",
        "async, s",
        "sync, s",
        "sync / async",
        "of the p90",
        "async images/s",
        "sync images/s",
    ]
    about = _BESIDE.format(
        servers=SERVERS,
        images=PUBLISHED["images_per_s"],
        step_s=PUBLISHED["step_s"],
        workers=WORKERS,
        gain=100 * PUBLISHED["speedup"],
    )
    return "\n".join(
        [
            about,
            _table(["stragglers", "computing, s", "applying, ns/byte", "slow machines, ×"], fitted),
            _BACKUPS,
            _table(["stragglers", *(f"b = {b}" for b in backups)], gains),
            _RATIOS,
            _table(head, shape),
            _verdict(rows),
        ]
    )


def _both(row: dict[str, Any]) -> Iterable[tuple[float, float]]:
    return zip(row["step_s_by_backups"], row["speedup_by_backups"], strict=True)


def _verdict(rows: list[dict[str, Any]]) -> str:
    lines = ["What agrees and what does not:\n"]
    for row in rows:
        ratios = [w["sync_s"] / w["async_s"] for w in row["by_workers"]]
        shortest = min(range(len(row["step_s_by_backups"])), key=row["step_s_by_backups"].__getitem__)
        best = max(range(len(row["speedup_by_backups"])), key=row["speedup_by_backups"].__getitem__)
        gain = 100 * row["speedup_by_backups"][best]
        lines.append(
            f"- *{row['name']}*: sync / async from {min(ratios):.2f} to {max(ratios):.2f} (published: about "
            f"{PUBLISHED['sync_over_async']:.2f}); best normalized speedup {gain:+.1f} % with b = {best} "
            f"(published: +{100 * PUBLISHED['speedup']:.1f} % with 3); shortest step with b = {shortest} of 0 to "
            f"{len(row['step_s_by_backups']) - 1} (published: 4)."
        )
    lines.append(
        "- The two published figures do not come from one set of stragglers in this model. If 3 backups make a step "
        "1.16 times as short (9.5 % after counting the machines), a step without them waits about as much for "
        "stragglers as backups save, which an asynchronous step does not: so it should be longer than an asynchronous "
        "one by more than 10 %, unless servers slow asynchronous steps more than synchronous ones.\n"
        "- That a fifth backup makes steps longer is not reproduced: traffic of late gradients costs little here, as "
        "cards are shared fairly and servers drop a late gradient at no cost.\n"
    )
    return "\n".join(lines)
