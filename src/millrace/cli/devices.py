"""`millrace devices`: the devices of this machine, or of a cluster file, and what they reach."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from millrace.cli.arguments import add_json, parser, print_json, tell
from millrace.cli.table import aligned
from millrace.place.cluster import CLASSES, MEMORY, Cluster
from millrace.place.cluster_file import read_cluster, write_cluster
from millrace.place.probe import local_cluster

_DESCRIPTION = "List devices with their memory and rates, and the links between them. This machine is measured once."
_EXAMPLES = """
millrace devices
millrace devices --measure-again
millrace devices --write here.toml        a cluster file to edit
millrace devices --cluster here.toml      check and show one"""


def main(arguments: list[str]) -> None:
    """Parse, measure or read, print."""
    options = parser("devices", _DESCRIPTION, _EXAMPLES)
    options.add_argument(
        "--cluster", type=Path, metavar="FILE", help="show this cluster file; without it, this machine"
    )
    options.add_argument("--measure-again", action="store_true", help="measure even where figures were kept")
    options.add_argument("--write", type=Path, metavar="FILE", help="write the cluster to a TOML file")
    add_json(options)
    given = options.parse_args(arguments)
    again = given.measure_again
    cluster = read_cluster(given.cluster) if given.cluster else local_cluster(measure_again=again, say=tell)
    print(table(cluster))
    if given.write is not None:
        write_cluster(cluster, given.write)
        print(f"\n{given.write}: the cluster")
    if given.json:
        print_json(dataclasses.asdict(cluster))


def table(cluster: Cluster) -> str:
    """Devices and links, in aligned columns."""
    rows = [["device", "kind", "memory", "threads", *CLASSES, "dispatch"]]
    for d in cluster.devices:
        rates = [f"{d.rates[c] / 1e9:.4g} {'GB/s' if c == MEMORY else 'Gflop/s'}" for c in CLASSES]
        memory = f"{d.memory_bytes / 2**30:.1f} GiB"
        rows.append([d.name, d.kind, memory, str(d.threads), *rates, f"{d.dispatch_s * 1e6:.1f} us"])
    links = [["from", "to", "latency", "rate", "shared", "sender"]]
    for k in cluster.links:
        rate, shared = f"{k.bytes_per_s / 1e9:.4g} GB/s", "yes" if k.shared else "no"
        sender = "copies" if k.sender_copies else "free"
        links.append([k.source, k.target, f"{k.latency_s * 1e6:.1f} us", rate, shared, sender])
    return aligned(rows) + ("\n\n" + aligned(links) if cluster.links else "")
