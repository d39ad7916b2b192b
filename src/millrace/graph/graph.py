"""The graph of one step: an `fx.Graph` of functional ATen with a signature.

The nodes stand in this order: one placeholder for every variable, one for every feed, the computation, and one output
that lists the fetches and then the new values of the variables. Nothing in a graph mutates anything: that a variable
changes is said only by the signature's `updates`, so that every pass may move, copy or drop nodes freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from millrace.errors import FetchError, GraphError, did_you_mean
from millrace.graph.signature import Feed, Phase, TensorSpec, Variable

INFO = "millrace"  # the key of NodeInfo in Node.meta
TRAIN = "train"  # the fetch that stands for "apply every update"


@dataclass(frozen=True)
class Wish:
    """What model code says of its nodes in a `with`. name: a device, or those to be with; "" lifts what is around it.

    line: the user's source line, "file.py:12 in forward".
    """

    name: str
    line: str = ""


@dataclass(frozen=True)
class NodeInfo:
    """What is known of a node beyond its operator: where it comes from.

    scope: path of the module that made it ("encoder.layers.0"), of its forward node for a backward node.
    phase: forward, backward or update.
    variable: for an update node, the owner of the variables that it leads to ("*" when it serves several).
    line: the user's source line, "file.py:12 in forward", or "" when unknown.
    block: which block of a split layer it computes; None for a node of no block, as those that join blocks are.
    device, together: what `with millrace.device` and `with millrace.colocate` say of it, of its forward node for a
        backward node; None where they say nothing.
    sequence: when its forward operator was traced (for a backward node: that which it is the gradient of): autograd's
        count, from the beginning of the step; None when unknown.
    """

    scope: str = ""
    phase: Phase = Phase.FORWARD
    variable: str = ""
    line: str = ""
    block: int | None = None
    device: Wish | None = None
    together: Wish | None = None
    sequence: int | None = None


@dataclass(frozen=True)
class Graph:
    """One step as data. Treat as immutable; passes return a new one.

    module: holds the `fx.Graph` and its constants and subgraphs (branches and loop bodies).
    fetches: fetch name -> node name. updates: variable name -> node name of its new value.
    feed_tree: how the user's batch nests (a pytree spec as JSON), so that a batch can be flattened into `feeds`.
    initial: the variables' values when the graph was traced (the caller's own tensors), empty for a loaded graph.
    retrace: makes the graph of the same step for a batch of other shapes; None for a loaded graph.
    steps: how many steps one run of it takes; more than one after `passes.unroll`.
    """

    module: GraphModule
    variables: tuple[Variable, ...]
    feeds: tuple[Feed, ...]
    fetches: Mapping[str, str]
    updates: Mapping[str, str]
    feed_tree: str
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    retrace: Callable[[Any], Graph] | None = None
    steps: int = 1

    @property
    def fx(self) -> torch.fx.Graph:
        return self.module.graph

    @property
    def nodes(self) -> list[Node]:
        """The nodes that compute something: no placeholders, no constants, no output."""
        return [n for n in self.fx.nodes if n.op == "call_function"]

    def node(self, name: str) -> Node:
        """The node of that name. Raises FetchError with the nearest names."""
        for candidate in self.fx.nodes:
            if candidate.name == name:
                return candidate
        raise FetchError(
            f"the graph has no node {name!r}. {did_you_mean(name, [n.name for n in self.nodes])} "
            "`print(graph)` lists every node."
        )

    def variable(self, name: str) -> Variable:
        """The variable of that name. Raises FetchError with the nearest names."""
        for candidate in self.variables:
            if candidate.name == name:
                return candidate
        raise FetchError(f"the graph has no variable {name!r}. {did_you_mean(name, [v.name for v in self.variables])}")

    def placeholders(self) -> dict[str, Node]:
        """Variable and feed placeholders by their names in the signature (a feed as "feed:NAME")."""
        found = [n for n in self.fx.nodes if n.op == "placeholder"]
        names = [v.name for v in self.variables] + [feed_key(f.name) for f in self.feeds]
        if len(found) != len(names):
            raise GraphError(f"the graph has {len(found)} inputs but its signature names {len(names)}")
        return dict(zip(names, found, strict=True))

    def with_(self, **changes: Any) -> Graph:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    # `text.py` puts itself here: a graph prints itself, yet the printer is built on the graph.
    printer: ClassVar[Callable[[Graph], str]] = repr

    def __str__(self) -> str:
        return type(self).printer(self)


def feed_key(name: str) -> str:
    """The key of a feed among a graph's inputs; the prefix keeps it apart from a variable of the same name."""
    return f"feed:{name}"


def info(node: Node) -> NodeInfo:
    """The node's origin; an empty one when a pass made the node and had nothing to say."""
    return node.meta.get(INFO, NodeInfo())


def spec_of(node: Node) -> TensorSpec | None:
    """Shape and dtype of the node's value; None when it is not a single tensor."""
    value = node.meta.get("val")
    return TensorSpec.of(value) if isinstance(value, Tensor) else None


def set_output(graph: torch.fx.Graph, results: Sequence[Node]) -> None:
    """Replace the output node of `graph` by one that returns `results`."""
    for node in list(graph.nodes):
        if node.op == "output":
            graph.erase_node(node)
    output = graph.output(tuple(results))
    output.meta["val"] = tuple(n.meta.get("val") for n in results)


def copy_fx(module: GraphModule) -> tuple[torch.fx.Graph, dict[Node, Node]]:
    """A copy of a module's graph whose nodes may be changed, and the map from old to new nodes."""
    new = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = new.graph_copy(module.graph, mapping, return_output_node=False)
    for old, copied in mapping.items():
        copied.meta = dict(old.meta)
    new.output(output)
    return new, mapping


def step_module(root: GraphModule | dict[str, Any], fx: torch.fx.Graph) -> GraphModule:
    """The module of a changed copy of `root`'s graph; constants and subgraphs are shared with `root`, or are in it.

    Its code is generated when it is first called, as between passes nobody calls it.
    """
    return _LazyGraphModule(root, fx, class_name="Step")
