"""What a program is: one training step as a dataflow graph that can be traced, checked, printed, drawn and saved."""

from __future__ import annotations

from millrace.graph.check import check
from millrace.graph.control import cond, map_, scan
from millrace.graph.draw import draw
from millrace.graph.graph import TRAIN, Graph, NodeInfo, info
from millrace.graph.passes.prune import prune
from millrace.graph.save import graph_digest, load_graph, save_graph
from millrace.graph.signature import Feed, Phase, Role, TensorSpec, Variable
from millrace.graph.summary import summary
from millrace.graph.text import to_text
from millrace.graph.trace import trace
from millrace.graph.tracing.device_scopes import colocate, device
from millrace.graph.training import evaluation_graph, training_graph

__all__ = [
    "TRAIN",
    "Feed",
    "Graph",
    "NodeInfo",
    "Phase",
    "Role",
    "TensorSpec",
    "Variable",
    "check",
    "colocate",
    "cond",
    "device",
    "draw",
    "evaluation_graph",
    "graph_digest",
    "info",
    "load_graph",
    "map_",
    "prune",
    "save_graph",
    "scan",
    "summary",
    "to_text",
    "trace",
    "training_graph",
]
