"""Run by test_save.py in a fresh interpreter: `in_another_process.py GRAPH_FILE FOREIGN_FILE` prints one JSON object.

GRAPH_FILE is of `programs.deep_graph`; FOREIGN_FILE uses an operator that only the first process has registered.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from millrace.errors import GraphError
from millrace.graph.save import graph_digest, load_graph


def programs() -> Any:
    """The file programs.py beside this one, which is no installed module."""
    spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["programs"] = module
    spec.loader.exec_module(module)
    return module


def main(graph_file: str, foreign_file: str) -> None:
    torch.set_num_threads(1)
    shared = programs()
    traced, loaded = shared.deep_graph(), load_graph(graph_file)
    results = shared.run(loaded, traced.initial, shared.feeds_of(loaded))
    try:
        load_graph(foreign_file)
        complaint = ""
    except GraphError as error:
        complaint = str(error)
    found = {
        "traced": graph_digest(traced),
        "loaded": graph_digest(loaded),
        "results": [shared.bits(value).hex() for value in results],
        "complaint": complaint,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
