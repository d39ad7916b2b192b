"""Recurrent layers in chunks of time, so that layers on several devices work like a wave that runs through them.

A layer over T steps becomes several over consecutive parts of them. The second layer can begin with the first chunk
when the first layer has done that, while the first is at the next (Appleyard, Kočiský, Blunsom, "Optimizing performance
of recurrent neural networks on GPUs", 2016, §3.3, run the cells of a stack so). What lies between the layers and treats
every step of time alike stands once for each chunk, too.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from millrace.errors import GraphError
from millrace.graph.encoding import attribute
from millrace.graph.graph import Graph, set_output, step_module
from millrace.graph.passes.chunking import lstm, sequences
from millrace.graph.passes.chunking.builder import CHUNK, ChunkBuilder
from millrace.graph.passes.chunking.steps import chunks_of_steps
from millrace.graph.passes.microbatch import MICROBATCH
from millrace.graph.passes.splitting.builder import fake_mode, fits
from millrace.graph.passes.splitting.elementwise import elementwise, is_elementwise
from millrace.graph.passes.splitting.rules import RULES
from millrace.graph.passes.splitting.values import Several, Value

_OWN_RULES = {**lstm.RULES, **sequences.RULES}


def time_chunks(graph: Graph, chunks: int) -> Graph:
    """The graph with its recurrences in `chunks` parts of time.

    An LSTM layer that is one node becomes `chunks` nodes, each of which begins with the state in which the one before
    it ended; its gradient likewise, the other way round. A recurrence that is written out already (cells in a Python
    loop, GRU) keeps its nodes, and each is told its chunk, `Node.meta[CHUNK]`. What comes between is computed by chunks
    where each step of time is treated alike, and on the whole sequence elsewhere. Numbers are the same up to the order
    in which gradients are added up; random numbers are drawn as before, and the same ones fall on the same places.

    Recurrences with fewer steps stay whole, as do loops in control flow (`torch.scan`). A step that is traced again is
    cut again. Comes after `split` and before `microbatch`.

    Args:
        chunks: how many; 1 leaves the graph as it is.

    Returns: the graph in chunks, or the given one where nothing recurs.

    Raises: GraphError for fewer than one chunk, and for a graph that is in chunks or microbatches already.
    """
    if chunks < 1:
        raise GraphError(f"time_chunks needs at least one chunk; got {chunks=}")
    if any(key in node.meta for node in graph.nodes for key in (CHUNK, MICROBATCH)):
        raise GraphError("the graph is in chunks or microbatches already; cut the graph that it was made from")
    if chunks == 1:
        return graph
    builder = ChunkBuilder(chunks, fake_mode(graph), chunks_of_steps(graph, chunks))
    result = _rewritten(graph, builder)
    if not any(CHUNK in node.meta for node in result.nodes):
        return graph
    again = graph.retrace
    return result if again is None else result.with_(retrace=lambda batch: time_chunks(again(batch), chunks))


def _rewritten(graph: Graph, builder: ChunkBuilder) -> Graph:
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            new = builder.fx.create_node(node.op, node.target, (), {}, name=node.name)
            new.meta = dict(node.meta)
            builder.values[node] = new
        elif node.op != "output":
            builder.begin(node)
            builder.values[node] = (
                _value(builder, node)
                if node.op == "call_function"
                else builder.constant(node, attribute(graph.module, str(node.target)))
            )
    fetches = {name: builder.whole(graph.node(node)) for name, node in graph.fetches.items()}
    updates = {name: builder.whole(graph.node(node)) for name, node in graph.updates.items()}
    set_output(builder.fx, [*fetches.values(), *updates.values()])
    builder.fx.eliminate_dead_code()
    return graph.with_(
        module=step_module(graph.module, builder.fx),
        fetches={name: node.name for name, node in fetches.items()},
        updates={name: node.name for name, node in updates.items()},
    )


def _value(builder: ChunkBuilder, node: Node) -> Value:
    """What a node becomes: by the rule of its operator, or as it is."""
    source = builder.values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if isinstance(source, Several) and node.target is operator.getitem:
        return source.values[node.args[1]]  # type: ignore[index]
    own = _OWN_RULES.get(str(node.target))
    if own is not None and (value := own(builder, node)) is not None:
        return value
    rule = RULES.get(node.target) or (elementwise if is_elementwise(node.target) else None)
    # A node of one step of time is small already, also where it reads a whole sequence (attention does).
    divided = node not in builder.steps and any(builder.layouts(n) for n in node.all_input_nodes)
    if own is None and rule is not None and divided:
        value = rule(builder, node)
        if value is not None and fits(value, node.meta.get("val")):
            return value
    return builder.copy(node)
