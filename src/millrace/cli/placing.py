"""What the commands that place a step have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from millrace.cli.arguments import tell
from millrace.errors import SettingError
from millrace.graph.graph import Graph
from millrace.graph.passes.gradients_apart import gradients_apart
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.split import split
from millrace.graph.passes.time_chunks import time_chunks
from millrace.place.algorithms.registry import ALGORITHMS
from millrace.place.cluster_file import read_cluster
from millrace.place.placement import Placement, place, search_at_hand
from millrace.place.probe import local_cluster
from millrace.place.wire import CODECS
from millrace.zoo.run import configure, step_graph

PLACING = (
    "cluster",
    "devices",
    "search",
    "budget",
    "microbatches",
    "time_chunks",
    "partitions",
    "on",
    "wire",
)  # the arguments of add_placing


def add_dividing(options: argparse.ArgumentParser) -> None:
    """What a step is divided into, and the wishes for where the parts are."""
    options.add_argument("--microbatches", type=int, default=1, metavar="N", help="parts of each batch (1)")
    options.add_argument(
        "--time-chunks", type=int, default=1, metavar="N", help="parts of time of recurrent layers (1)"
    )
    options.add_argument("--partitions", type=int, default=1, metavar="N", help="blocks of each wide layer (1)")
    options.add_argument(
        "--on", action="append", default=[], metavar="MODULES=DEVICE", help="a wish; * stands for anything"
    )
    options.add_argument(
        "--wire", metavar="CODEC", help=f"narrow what goes between devices: one of {', '.join(CODECS)}"
    )


def add_placing(options: argparse.ArgumentParser) -> None:
    """A cluster, how the step is divided, and how its placement is searched."""
    options.add_argument("--cluster", type=Path, metavar="FILE", help="the cluster; without it, this machine")
    options.add_argument(
        "--devices", type=devices_of, default=1, metavar="N", help="CPU workers here (1), or gpu:0,cpu:0, or all"
    )
    options.add_argument("--search", default="auto", metavar="NAME", help=f"one of {', '.join(ALGORITHMS)}")
    options.add_argument("--budget", type=float, metavar="SECONDS", help="how long to search")
    add_dividing(options)


def devices_of(text: str) -> int | list[str]:
    """Devices of this machine as `local_cluster` takes them: how many CPU workers, or names."""
    return int(text) if text.lstrip("-").isdecimal() else text.split(",")


def placed_step(given: argparse.Namespace) -> tuple[Graph, Placement]:
    """The step of a task, and the placement of it (its batch divided), as `add_placing` and the command's TASK say.

    Raises: SettingError, PlacementError.
    """
    for name in ("microbatches", "time_chunks", "partitions"):
        if getattr(given, name) < 1:
            written = name.replace("_", "-")
            raise SettingError(f"--{written} {getattr(given, name)}: expected a whole number of at least 1")
    graph = split(step_graph(configure(given.task, given.assignments)), given.partitions)
    graph = prune(graph, ["loss"], graph.updates)
    cluster = read_cluster(given.cluster) if given.cluster else local_cluster(given.devices, say=tell)
    parts = gradients_apart(microbatch(time_chunks(graph, given.time_chunks), given.microbatches))
    hints, codec = wishes(given.on), given.wire
    if not search_at_hand():
        tell("compiling the search for a placement, once on this machine: up to a minute")
    return graph, place(parts, cluster, hints, search=given.search, budget_s=given.budget, wire=codec)


def wishes(assignments: list[str]) -> dict[str, str]:
    """Module patterns and devices from texts such as "encoder.*=gpu:0". Raises: SettingError."""
    found = {}
    for assignment in assignments:
        pattern, separator, device = assignment.partition("=")
        if not separator or not pattern or not device:
            raise SettingError(f"--on {assignment!r}: expected MODULES=DEVICE, such as --on 'encoder.*=gpu:0'")
        found[pattern] = device
    return found
