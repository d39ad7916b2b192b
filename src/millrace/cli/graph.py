"""`millrace graph`: one training step of a task, as text, as a picture, or as a file to load."""

from __future__ import annotations

from pathlib import Path

from millrace.cli.arguments import add_settings, parser
from millrace.errors import MillraceError, SettingError, did_you_mean
from millrace.graph.draw import draw
from millrace.graph.graph import Graph
from millrace.graph.save import save_graph
from millrace.graph.summary import summary
from millrace.graph.text import to_text
from millrace.zoo.run import configure, step_graph

_DESCRIPTION = """\
Show one training step of a task (forward, backward, update) as the dataflow graph that millrace runs.

Without --out it is printed as text, with shape, dtype, module and phase of every node."""
_EXAMPLES = """
millrace graph digits | less
millrace graph chars --summary                   a table with one row per module
millrace graph digits --out step.svg             a picture with one box per module
millrace graph digits --out step.svg --nodes     a picture with one box per node
millrace graph digits --out step.safetensors     a file for millrace.graph.save.load_graph"""

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
    given = options.parse_args(arguments)
    if given.out is not None and given.out.suffix not in _SUFFIXES:
        raise SettingError(
            f"--out {given.out}: the suffix says what to write. {did_you_mean(given.out.suffix, _SUFFIXES)}"
        )
    graph = step_graph(configure(given.task, given.assignments))
    if given.out is None:
        print(summary(graph) if given.summary else to_text(graph, lines=given.lines))
        return
    try:
        _write(graph, given.out, nodes=given.nodes, lines=given.lines)
    except OSError as error:
        raise MillraceError(f"Cannot write {given.out}: {error.strerror or error}. Choose another place.") from error
    print(f"{given.out}: {len(graph.nodes)} nodes")


def _write(graph: Graph, path: Path, *, nodes: bool, lines: bool) -> None:
    if path.suffix == ".txt":
        path.write_text(to_text(graph, lines=lines) + "\n", encoding="utf-8")
    elif path.suffix == ".safetensors":
        save_graph(graph, path)
    else:
        draw(graph, path, level="node" if nodes else "module")
