"""What 8 to 1,024 workers would do, by simulation: `python -m bench.scale` writes docs/scale.md and its pictures.

The costs of a step are measured here, unless --costs names a JSON file of them (as bench/results/scale/scale.json has
them under "costs"). Everything else is stated in the page that it writes. Simulated runs, one thread, some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.figures import rounded
from bench.results import RESULTS, machine, stamped
from bench.scale_costs import Costs, measure
from bench.scale_paper import INCEPTION, compare
from bench.scale_report import pictures, report
from millrace.replicas.scale.job import HEAVY_STRAGGLERS, Job, Network, Stragglers
from millrace.replicas.scale.limits import saturation, servers_needed
from millrace.replicas.scale.outcome import Outcome
from millrace.replicas.scale.simulate import UNBOUNDED, simulate
from millrace.replicas.scale.ways import Asynchronous, Collective, Hybrid, Synchronous, Way

DOCS = RESULTS.parent.parent / "docs"
KEPT = RESULTS / "scale" / "scale.json"
WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
SERVERS = 16
NEEDED_FOR = (8, 32, 128, 512, 1024)
NETWORKS = {"slow": (125e6, 100e-6), "fast": (12.5e9, 5e-6)}  # 1 Gbit/s and 100 Gbit/s
GROUP, LOCAL = 8, 16


def ways(workers: int) -> dict[str, Way]:
    """The ways to agree that are compared; one backup for 16 workers."""
    backup = max(1, workers // 16)
    return {
        "ring": Collective(),
        f"ring every {LOCAL}": Collective(LOCAL),
        "servers": Synchronous(),
        "servers, backups": Synchronous(backup),
        "servers, backups, late wait": Synchronous(backup, late_waits=True),
        "async": Asynchronous(),
        "async every 4": Asynchronous(4, 4),
        f"hybrid, groups of {GROUP}": Hybrid(GROUP),
    }


def jobs(costs: Costs, overlap: bool) -> dict[str, Job]:
    """What is trained; the first on a GPU of 2013, as in the paper, the others as measured here."""
    work = {"sum_s_per_byte": costs.sum_s_per_byte, "apply_s_per_byte": costs.apply_s_per_byte, "overlap": overlap}
    size, small = float(costs.transformer_bytes), float(costs.digits_bytes)
    inception = INCEPTION.gradient_bytes, INCEPTION.fetch_bytes, INCEPTION.examples
    return {
        "inception": Job(INCEPTION.compute_s, *inception, **work),
        "transformer": Job(costs.transformer_s, size, size, costs.transformer_examples, **work),
        "digits": Job(costs.digits_s, small, small, costs.digits_examples, **work),
    }


def network(name: str, costs: Costs) -> Network:
    """By name; what sending a message costs the machines adds to the latency of the wire."""
    bytes_per_s, latency_s = NETWORKS[name]
    return Network(bytes_per_s, latency_s + costs.message_s)


def scaled(job: Job, net: Network, most: int, seed: int, stragglers: Stragglers) -> dict[str, Any]:
    """All ways, for all numbers of workers: figures and where each way saturates."""
    found: dict[str, dict[int, Outcome]] = {}
    for workers in (n for n in WORKERS if n <= most):
        for name, way in ways(workers).items():
            steps = max(40, min(400, 25_000 // workers)) // (LOCAL if way == Collective(LOCAL) else 1)
            found.setdefault(name, {})[workers] = simulate(
                job, net, workers, SERVERS, way, seed, max(steps, 20), stragglers=stragglers
            )
    return {
        name: {
            "by_workers": {str(n): _figures(outcome) for n, outcome in by_workers.items()},
            "saturates_at": saturation({n: outcome.examples_per_s for n, outcome in by_workers.items()}),
        }
        for name, by_workers in found.items()
    }


def servers(job: Job, net: Network, most: int, seed: int) -> dict[str, dict[str, int | None]]:
    """How many servers keep synchronous and asynchronous steps within 10 % of the rate with servers without limit."""
    found: dict[str, dict[str, int | None]] = {}
    for name, way in {"servers": Synchronous(), "async": Asynchronous()}.items():
        for workers in (n for n in NEEDED_FOR if n <= most):

            def rate(count: int, way: Way = way, workers: int = workers) -> float:
                return simulate(job, net, workers, count, way, seed, 40 if workers <= 128 else 20).examples_per_s

            found.setdefault(name, {})[str(workers)] = servers_needed(rate, rate(UNBOUNDED))
    return found


def _figures(outcome: Outcome) -> dict[str, Any]:
    names = (
        "steps_per_s examples_per_s step_s step_p90_s step_p99_s applied dropped tau_mean server_in_share "
        "server_out_share server_work_share worker_share machines"
    )
    tau = {"tau_p50": outcome.tau(0.5), "tau_p90": outcome.tau(0.9), "tau_p99": outcome.tau(0.99)}
    return {name: getattr(outcome, name) for name in names.split()} | tau


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, and write what came out."""
    given = _parser().parse_args(arguments)
    if given.table:
        return _write(json.loads(given.results.read_text()), given.out)
    start_s = time.perf_counter()
    costs = Costs(**json.loads(given.costs.read_text())) if given.costs else measure()
    cases: dict[str, Any] = {}
    for name, job in jobs(costs, given.overlap).items():
        for speed in NETWORKS:
            net = network(speed, costs)
            print(f"{name}, {speed} network", file=sys.stderr, flush=True)
            figures = scaled(job, net, given.most, given.seed, Stragglers())
            cases[f"{name}/{speed}"] = {"ways": figures, "servers_needed": servers(job, net, given.most, given.seed)}
    first = jobs(costs, given.overlap)["inception"]
    heavy = scaled(first, network("fast", costs), given.most, given.seed, HEAVY_STRAGGLERS)
    cases["inception/fast/heavy"] = {"ways": heavy, "servers_needed": {}}
    paper = compare(overlap=True) if given.paper else []
    whole = {"machine": machine("cpu"), "costs": costs.as_dict(), "servers": SERVERS, "cases": cases, "paper": paper}
    whole["seconds"] = time.perf_counter() - start_s
    whole = stamped(rounded(whole), ["python -m bench.scale", *(arguments or sys.argv[1:])])
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(whole, indent=1) + "\n")
    return _write(whole, given.out)


def _write(whole: dict[str, Any], directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in {"scale.md": report(whole), **pictures(whole)}.items():
        (directory / file).write_text(text)
    print(json.dumps({"name": "scale", "seconds": whole["seconds"], "wrote": str(directory / "scale.md")}))
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("--costs", type=Path, help="JSON file of what a step costs; without it, that is measured here")
    add("--most", type=int, default=WORKERS[-1], help="workers (default %(default)s)")
    add("--seed", type=int, default=1)
    add("--overlap", action="store_true", help="transfers run beside a worker's own computing")
    add("--no-paper", dest="paper", action="store_false", help="without the comparison with published runs")
    add("--table", action="store_true", help="simulate nothing, write the page of what is kept in --results")
    add("--out", type=Path, default=DOCS, help="directory for scale.md and its pictures (default: docs)")
    add("--results", type=Path, default=KEPT, help="file for all figures (default: bench/results/scale/scale.json)")
    return made


if __name__ == "__main__":
    sys.exit(main())
