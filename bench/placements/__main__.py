"""python -m bench.placements: every placement algorithm on eight graphs of full size and four clusters, in simulation.

Prints a line for each case and keeps it in bench/results/placements at once, so that an interrupted run goes on where
it was; writes docs/placement-report.md from all that is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.placements.cases import ExactSettings, Settings, compare_exact, run_case
from bench.placements.graphs import WORKLOADS, build, build_part
from bench.placements.report import speedup, text
from bench.results import RESULTS, stamped
from millrace.files import replace_bytes
from millrace.place.cluster import Cluster
from millrace.place.cluster_file import read_cluster

CLUSTERS = Path(__file__).resolve().parent / "clusters"
KEPT = RESULTS / "placements" / "cases.json"
REPORT = RESULTS.parent.parent / "docs" / "placement-report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan what is not kept yet. Exit status 0."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    clusters = {path.stem: read_cluster(path) for path in sorted(CLUSTERS.glob("*.toml"))}
    settings, exact = Settings(given.auto, given.search), ExactSettings(given.exact)
    kept = {} if given.again else read(given.kept)
    for name in given.graphs.split(","):
        wanted = [c for c in given.clusters.split(",") if c] or list(clusters)
        missing = [c for c in wanted if kept.get(f"{name} / {c}", {}).get("settings") != asdict(settings)]
        if missing:
            plan_graph(name, {c: clusters[c] for c in missing}, settings, kept, given.kept)
        missing = [c for c in wanted if kept[f"{name} / {c}"].get("exact", {}).get("settings") != asdict(exact)]
        if missing and WORKLOADS[name].exact:
            prove_graph(name, {c: clusters[c] for c in missing}, exact, kept, given.kept)
    if given.report and kept:
        cases = [kept[key] for w in WORKLOADS for c in clusters if (key := f"{w} / {c}") in kept]
        replace_bytes(given.report, text(cases, "python -m bench.placements").encode())
        print(f"wrote {given.report} from {len(cases)} cases")
    return 0


def plan_graph(
    name: str, clusters: dict[str, Cluster], settings: Settings, kept: dict[str, dict[str, Any]], path: Path
) -> None:
    """Trace a graph and plan it for each of the clusters; keep every case as soon as it is there."""
    workload = WORKLOADS[name]
    begun = time.perf_counter()
    graph = build(workload)
    facts = {
        "graph": name,
        "what": workload.what,
        "microbatches": workload.microbatches,
        "branchy": workload.branchy,
        "nodes": len(graph.nodes),
        "trace_s": time.perf_counter() - begun,
    }
    print(f"{name}: {facts['nodes']} nodes, traced in {facts['trace_s']:.0f} s", file=sys.stderr, flush=True)
    for label, cluster in clusters.items():
        rates = [device.rates for device in cluster.devices]
        case = {"name": f"{name} / {label}", **facts, "unequal": any(r != rates[0] for r in rates)}
        case |= run_case(graph, cluster, settings)
        kept[case["name"]] = stamped(case, ["python -m bench.placements", *sys.argv[1:]])
        keep(path, kept)
        gains = {n: round(gain, 3) for n in case["algorithms"] if (gain := speedup(case, n)) is not None}
        print(json.dumps({"name": case["name"], **gains}), flush=True)


def prove_graph(
    name: str, clusters: dict[str, Cluster], settings: ExactSettings, kept: dict[str, dict[str, Any]], path: Path
) -> None:
    """Put the integer program's answer for one microbatch to every case of a graph."""
    graph = build_part(WORKLOADS[name])
    for label, cluster in clusters.items():
        found = kept[f"{name} / {label}"]["exact"] = compare_exact(graph, cluster, settings)
        keep(path, kept)
        print(json.dumps({"name": f"{name} / {label}", "exact": found["note"]}), flush=True)


def keep(path: Path, kept: dict[str, dict[str, Any]]) -> None:
    """Write all cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, (json.dumps(kept, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The cases that are kept."""
    return json.loads(path.read_text()) if path.exists() else {}


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    made = argparse.ArgumentParser(prog="python -m bench.placements", description=(__doc__ or "").partition(": ")[2])
    add = made.add_argument
    add("--graphs", default=",".join(WORKLOADS), help="comma-separated (default %(default)s)")
    add("--clusters", default="", help="comma-separated names of files in bench/placements/clusters (all)")
    add("--auto", type=float, default=default.auto_s, metavar="S", help="for auto (%(default)s)")
    add(
        "--search",
        type=float,
        default=default.search_s,
        metavar="S",
        help="local search, policy gradient (%(default)s)",
    )
    add(
        "--exact",
        type=float,
        default=ExactSettings().search_s,
        metavar="S",
        help="for the integer program (%(default)s)",
    )
    add("--again", action="store_true", help="forget what is kept")
    add("--kept", type=Path, default=KEPT, help=argparse.SUPPRESS)
    add("--report", type=Path, default=REPORT, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    sys.exit(main())
