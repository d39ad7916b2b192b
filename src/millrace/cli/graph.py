"""`millrace graph`: one training step of a task, as text, as a picture, or as a file to load."""

from __future__ import annotations

import argparse
from pathlib import Path

from millrace.cli.arguments import add_settings, parser
from millrace.cli.placing import PLACING, add_placing, placed_step
from millrace.errors import MillraceError, SettingError, did_you_mean
from millrace.graph.draw import draw
from millrace.graph.graph import Graph
from millrace.graph.places import Places
from millrace.graph.save import save_graph
from millrace.graph.summary import summary
from millrace.graph.text import to_text
from millrace.place.summary import places_of
from millrace.train.events import EventWriter
from millrace.train.graph_views import node_views
from millrace.zoo.run import configure, step_graph

_DESCRIPTION = """\
Show one training step of a task (forward, backward, update) as the dataflow graph that millrace runs.

Without --out it is printed as text, with shape, dtype, module and phase of every node. With --placed a picture shows
which device of a cluster would run what, as `millrace place` decides it."""
_EXAMPLES = """
millrace graph digits | less
millrace graph chars --summary                   a table with one row per module
millrace graph digits --out step.svg             a picture with one box per module
millrace graph digits --out step.svg --nodes     a picture with one box per node
millrace graph digits --out step.safetensors     a file for millrace.graph.save.load_graph
millrace graph digits --tensorboard events       for TensorBoard's graph page: tensorboard --logdir events
millrace graph chars --placed --cluster four-gpus.toml --microbatches 4 --out placed.svg
millrace graph digits --placed --devices 2 --tensorboard events      choose "Color: Device" there"""

_PICTURES = [".svg", ".dot"]
_SUFFIXES = [".txt", ".svg", ".dot", ".safetensors"]


def main(arguments: list[str]) -> None:
    """Parse, trace, print or write."""
    options = parser("graph", _DESCRIPTION, _EXAMPLES)
    options.add_argument("task", metavar="TASK", help="one of `millrace tasks`")
    add_settings(options)
    options.add_argument("--summary", action="store_true", help="print one row per module")
    options.add_argument("--lines", action="store_true", help="in text: the source line of every node")
    options.add_argument("--out", type=Path, metavar="FILE", help=f"write to a file: {', '.join(_SUFFIXES)}")
    options.add_argument("--nodes", action="store_true", help="in a picture: a box per node")
    options.add_argument("--tensorboard", type=Path, metavar="DIR", help="write an event file for TensorBoard into DIR")
    options.add_argument("--placed", action="store_true", help="in a picture: which device runs what")
    add_placing(options)
    given = options.parse_args(arguments)
    _check(options, given)
    if given.out is not None and given.out.suffix not in _SUFFIXES:
        raise SettingError(
            f"--out {given.out}: the suffix says what to write. {did_you_mean(given.out.suffix, _SUFFIXES)}"
        )
    graph, places = _graph(given)
    if given.tensorboard is not None:
        with EventWriter(given.tensorboard) as events:
            events.graph(node_views(graph, places))
        print(f"{given.tensorboard}: {len(graph.nodes)} nodes, for tensorboard --logdir {given.tensorboard}")
    if given.out is not None:
        try:
            _write(graph, given, places)
        except OSError as error:
            why = error.strerror or error
            raise MillraceError(f"Cannot write {given.out}: {why}. Choose another place.") from error
        print(f"{given.out}: {len(graph.nodes)} nodes")
    elif given.tensorboard is None:
        print(summary(graph) if given.summary else to_text(graph, lines=given.lines))


def _check(options: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    pictures = given.tensorboard is not None or (given.out is not None and given.out.suffix in _PICTURES)
    if given.placed and not pictures:
        options.error(f"--placed is for pictures: --out FILE with {' or '.join(_PICTURES)}, or --tensorboard DIR")
    if given.placed and given.cluster is None and given.devices == 1:
        options.error("--placed needs devices to place on: --devices N for workers of this machine, or --cluster FILE")
    asked = [name for name in PLACING if getattr(given, name) != options.get_default(name)]
    if asked and not given.placed:
        options.error(f"--{asked[0]} is for --placed")


def _graph(given: argparse.Namespace) -> tuple[Graph, Places | None]:
    if not given.placed:
        return step_graph(configure(given.task, given.assignments)), None
    graph, placement = placed_step(given)
    return graph, places_of(placement, graph)


def _write(graph: Graph, given: argparse.Namespace, places: Places | None) -> None:
    path: Path = given.out
    if path.suffix == ".txt":
        path.write_text(to_text(graph, lines=given.lines) + "\n", encoding="utf-8")
    elif path.suffix == ".safetensors":
        save_graph(graph, path)
    else:
        draw(graph, path, level="node" if given.nodes else "module", places=places)
