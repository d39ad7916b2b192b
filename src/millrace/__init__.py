"""One training step as one dataflow graph: traced from ordinary PyTorch, compiled, run, saved and resumed.

    millrace.fit(model, data, loss=loss, optimizer=torch.optim.AdamW(model.parameters()), epochs=3)

trains any module; `trace` and `training_graph` make graphs, a `Session` runs them; ARCHITECTURE.md tells the whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from millrace.errors import MillraceError
from millrace.version import __version__

if TYPE_CHECKING:
    from millrace import data, errors, graph, optim
    from millrace.graph import (
        Graph,
        colocate,
        cond,
        device,
        evaluation_graph,
        load_graph,
        map_,
        save_graph,
        scan,
        training_graph,
    )
    from millrace.graph.trace import trace
    from millrace.runtime import Checkpoints, Session, load_weights, save_weights
    from millrace.train import Callback, EarlyStopping, Estimator, Evaluator, Model, Result, RunDirectory
    from millrace.train.fit import fit

__all__ = [
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "Estimator",
    "Evaluator",
    "Graph",
    "MillraceError",
    "Model",
    "Result",
    "RunDirectory",
    "Session",
    "__version__",
    "colocate",
    "cond",
    "data",
    "device",
    "errors",
    "evaluation_graph",
    "fit",
    "graph",
    "load_graph",
    "load_weights",
    "map_",
    "optim",
    "save_graph",
    "save_weights",
    "scan",
    "trace",
    "training_graph",
]

_ROOMS = ("millrace.graph", "millrace.runtime", "millrace.train")  # where the names are

if not TYPE_CHECKING:  # a type checker would believe every name

    def __getattr__(name: str) -> Any:
        """Import what is asked for: PyTorch takes seconds, which the command line's help need not wait for."""
        if name not in __all__:
            raise AttributeError(f"module 'millrace' has no attribute {name!r}")
        if name in ("data", "errors", "graph", "optim"):
            return importlib.import_module(f"millrace.{name}")
        room = next(room for room in map(importlib.import_module, _ROOMS) if name in room.__all__)
        globals()[name] = found = getattr(room, name)
        return found

    def __dir__() -> list[str]:
        return __all__
