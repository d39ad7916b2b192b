"""The child process that compiles in the background: reads a graph file, leaves the artifact in the cache.

Run as `python -m millrace.compile.worker GRAPH_FILE THREADS PARENT_PID`. Exit status 0: the artifact is in the cache;
1: the last line on standard error says why not; 3: the graph uses an operator that only the parent process has
registered.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from millrace.child_process import end_with, give_way
from millrace.compile.inductor import compile_inductor, is_cached
from millrace.errors import CompileError, GraphError
from millrace.graph.save import load_graph

UNKNOWN_OPERATOR = 3


def main(arguments: list[str]) -> int:
    graph_file, threads, parent = arguments
    end_with(int(parent))
    give_way(10)  # training goes on meanwhile
    torch.set_num_threads(int(threads))
    try:
        graph = load_graph(Path(graph_file))
    except GraphError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return UNKNOWN_OPERATOR
    try:
        compile_inductor(graph, int(threads))
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if is_cached(graph, int(threads)) else UNKNOWN_OPERATOR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
