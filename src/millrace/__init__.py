"""One training step as one dataflow graph: traced from ordinary PyTorch, compiled, run, saved and resumed.

    millrace.fit(model, data, loss=loss, optimizer=torch.optim.AdamW(model.parameters()), epochs=3)

trains any module; `trace` and `training_graph` make graphs, a `Session` runs them; ARCHITECTURE.md tells the whole.
"""

from __future__ import annotations

from millrace import data, errors, graph, optim
from millrace.errors import MillraceError
from millrace.graph import Graph, cond, evaluation_graph, load_graph, map_, save_graph, scan, trace, training_graph
from millrace.runtime import Checkpoints, Session, load_weights, save_weights
from millrace.train import Callback, EarlyStopping, Estimator, Evaluator, Model, Result, RunDirectory, fit
from millrace.version import __version__

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
    "cond",
    "data",
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
