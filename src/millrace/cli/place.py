"""`millrace place`: where the parts of a task's training step would run on a cluster, and what that would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from millrace.cli.arguments import add_json, add_settings, parser, print_json
from millrace.errors import MillraceError, SettingError
from millrace.graph.passes.gradients_apart import gradients_apart
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.time_chunks import time_chunks
from millrace.place.algorithms.registry import ALGORITHMS
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.place.cluster_file import read_cluster
from millrace.place.placement import Placement, place
from millrace.place.probe import local_cluster
from millrace.place.wire import CODECS
from millrace.zoo.run import configure, step_graph

_DESCRIPTION = """\
Decide which device of a cluster runs which part of a task's training step, and say what to expect of it: the time of a
step, how busy each device is, how much memory it needs, and what goes over each link.

The cluster may be one that you don't have: describe it in a file (see `millrace devices --write FILE`)."""
_EXAMPLES = """
millrace place chars --cluster four-gpus.toml
millrace place chars --cluster four-gpus.toml --microbatches 8 --out step.json     the timeline, for ui.perfetto.dev
millrace place chars --devices 2 --on "blocks.0=cpu:0"                             two workers on this machine
millrace place chars --cluster four-gpus.toml --search heft"""


def main(arguments: list[str]) -> None:
    """Parse, place, print."""
    options = parser("place", _DESCRIPTION, _EXAMPLES)
    options.add_argument("task", metavar="TASK", help="one of `millrace tasks`")
    add_settings(options)
    options.add_argument("--cluster", type=Path, metavar="FILE", help="the cluster; without it, this machine")
    options.add_argument(
        "--devices", type=_devices, default=1, metavar="N", help="CPU workers here (1), or gpu:0,cpu:0, or all"
    )
    options.add_argument("--search", default="auto", metavar="NAME", help=f"one of {', '.join(ALGORITHMS)}")
    options.add_argument("--budget", type=float, metavar="SECONDS", help="how long to search")
    options.add_argument("--microbatches", type=int, default=1, metavar="N", help="parts of each batch (1)")
    options.add_argument(
        "--time-chunks", type=int, default=1, metavar="N", help="parts of time of recurrent layers (1)"
    )
    options.add_argument(
        "--on", action="append", default=[], metavar="MODULES=DEVICE", help="a wish; * stands for anything"
    )
    options.add_argument(
        "--wire", metavar="CODEC", help=f"narrow what goes between devices: one of {', '.join(CODECS)}"
    )
    options.add_argument("--out", type=Path, metavar="FILE.json", help="write the expected timeline")
    add_json(options)
    given = options.parse_args(arguments)
    whole = time_chunks(step_graph(configure(given.task, given.assignments)), given.time_chunks)
    graph = gradients_apart(microbatch(whole, given.microbatches))
    graph = prune(graph, ["loss"], graph.updates)
    cluster = read_cluster(given.cluster) if given.cluster else local_cluster(given.devices)
    found = place(graph, cluster, _wishes(given.on), search=given.search, budget_s=given.budget, wire=given.wire)
    print(describe(found))
    if given.out is not None:
        try:
            write_trace(expected_spans(found), given.out, f"{given.task}, as expected")
        except OSError as error:
            why = error.strerror or error
            raise MillraceError(f"Cannot write {given.out}: {why}. Choose another place.") from error
        print(f"\n{given.out}: the timeline, to be opened at ui.perfetto.dev")
    if given.json:
        print_json(as_json(found))


def _devices(text: str) -> int | list[str]:
    return int(text) if text.lstrip("-").isdecimal() else text.split(",")


def _wishes(assignments: list[str]) -> dict[str, str]:
    wishes = {}
    for assignment in assignments:
        pattern, separator, device = assignment.partition("=")
        if not separator or not pattern or not device:
            raise SettingError(f"--on {assignment!r}: expected MODULES=DEVICE, such as --on 'encoder.*=gpu:0'")
        wishes[pattern] = device
    return wishes


def describe(placement: Placement) -> str:
    """A placement in words and tables."""
    problem, expected = placement.problem, placement.expected
    groups: dict[str, list[str]] = {name: [] for name in problem.device_names_D}
    for group, device in placement.device_of_group.items():
        groups[device].append(group)
    lines = [f"{1e3 * expected.step_s:.4g} ms a step expected: {placement.plan.note}", ""]
    width = max(map(len, groups))
    lines.append(f"{'device':{width}}  busy      memory         of  groups")
    for index, (device, names) in enumerate(groups.items()):
        busy = expected.busy_s_D[index] / expected.step_s if expected.step_s else 0.0
        peak, whole = expected.peak_bytes_D[index], problem.memory_bytes_D[index]
        lines.append(f"{device:{width}}  {busy:4.0%}  {_size(peak):>10} {_size(whole):>10}  {', '.join(names) or '-'}")
    sent = [
        f"{problem.device_names_D[s]} to {problem.device_names_D[t]}: {_size(expected.bytes_DD[s, t])}"
        for s in range(problem.devices)
        for t in range(problem.devices)
        if expected.bytes_DD[s, t]
    ]
    lines += ["", "over links, each step: " + ("; ".join(sent) or "nothing")]
    return "\n".join(lines)


def as_json(placement: Placement) -> dict[str, Any]:
    """A placement for programs."""
    problem, expected = placement.problem, placement.expected
    return {
        "step_s": expected.step_s,
        "algorithm": placement.plan.algorithm,
        "note": placement.plan.note,
        "devices": {
            device: {
                "busy_share": float(expected.busy_s_D[index] / expected.step_s) if expected.step_s else 0.0,
                "peak_bytes": float(expected.peak_bytes_D[index]),
                "sent_bytes": float(expected.bytes_DD[index].sum()),
            }
            for index, device in enumerate(problem.device_names_D)
        },
        "groups": placement.device_of_group,
    }


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    return ""
