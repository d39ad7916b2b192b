"""Attention that PyTorch has a kernel for on CPUs only, written out so that it runs on every kind of device.

Traced on a CPU, `scaled_dot_product_attention` is `aten._scaled_dot_product_flash_attention_for_cpu`, and its gradient
another operator that goes with it. Other devices have kernels of their own, each with results and states of its own;
the two operators as plain products and exponentials hand over the same two tensors, so that a forward pass and its
backward pass may run on devices of different kinds.

Source: Dao et al., "FlashAttention" (NeurIPS 2022), appendix B: the gradient from the output and the logarithm of the
row sums. Unlike there, the weights [B, H, T, S] are in memory as a whole.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.errors import GraphError
from millrace.graph.graph import INFO, Graph, copy_fx, set_output, step_module

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Shape legend: B batch, H heads, T queries, S keys, E width of a head.


def portable_attention(graph: Graph) -> Graph:
    """Rewrite every such operator; the graph itself when there is none.

    The kernel lays out its output as [B, T, H, E]; here it is not. So a view of it may have to be a copy.

    Raises: GraphError for attention with dropout inside, which no trace makes: randomness is explicit.
    """
    if not any(node.target in (_FORWARD, _BACKWARD) for node in graph.nodes):
        return graph
    fx, mapping = copy_fx(graph.module)
    by_name = {old.name: new for old, new in mapping.items()}
    ends = {name: by_name[name] for name in (*graph.fetches.values(), *graph.updates.values())}
    for node in list(fx.nodes):
        if node.op == "call_function" and node.target in (_FORWARD, _BACKWARD):
            replaced = _written_out(fx, node, _forward if node.target is _FORWARD else _backward)
            ends = {name: replaced.get(end, end) for name, end in ends.items()}
    set_output(fx, [*(ends[name] for name in graph.fetches.values()), *(ends[n] for n in graph.updates.values())])
    return graph.with_(
        module=step_module(graph.module, fx),
        fetches={fetch: ends[name].name for fetch, name in graph.fetches.items()},
        updates={variable: ends[name].name for variable, name in graph.updates.items()},
    )


def _written_out(fx: torch.fx.Graph, node: Node, body: Callable[..., tuple[Tensor, ...]]) -> dict[Node, Node]:
    """Put what `body` does in place of `node`. Returns: what stood for each result -> what does now."""
    inputs = node.all_input_nodes
    place = {each: index for index, each in enumerate(inputs)}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: tensors[place[n]])
        return body(*args, **kwargs)

    with torch.no_grad():
        inner = make_fx(call)(*(each.meta["val"] for each in inputs))
    copies = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    results: tuple[Node, ...] = ()
    with fx.inserting_before(node):
        for source in inner.graph.nodes:
            if source.op == "call_function":
                copies[source] = fx.node_copy(source, lambda n: copies[n])
                copies[source].meta = {"val": source.meta["val"], INFO: node.meta[INFO]}
            elif source.op == "output":
                results = tuple(copies[result] for result in source.args[0])
    replaced = {}
    for pick in list(node.users):
        assert pick.target is operator.getitem, pick
        replaced[pick] = results[pick.args[1]]  # type: ignore[index]
        pick.replace_all_uses_with(replaced[pick])
        fx.erase_node(pick)
    fx.erase_node(node)
    return replaced


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, E] and the logarithm of the row sums [B, H, T]."""
    scores_BHTS = _scores(query, key, dropout_p, is_causal, attn_mask, scale)
    sums_BHT = torch.logsumexp(scores_BHTS, -1)
    return (_weights(scores_BHTS, sums_BHT) @ _wide(value)).to(query.dtype), sums_BHT


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums_BHT: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    weights_BHTS = _weights(_scores(query, key, dropout_p, is_causal, attn_mask, scale), sums_BHT)
    of_output = _wide(gradient)
    of_weights = of_output @ _wide(value).mT
    row_BHT1 = (of_output * _wide(output)).sum(-1, keepdim=True)
    of_scores = weights_BHTS * (of_weights - row_BHT1) * _factor(query, scale)
    found = (of_scores @ _wide(key), of_scores.mT @ _wide(query), weights_BHTS.mT @ of_output)
    return found[0].to(query.dtype), found[1].to(key.dtype), found[2].to(value.dtype)


def _scores(
    query: Tensor, key: Tensor, dropout_p: float, is_causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    if dropout_p:
        raise GraphError(
            f"attention with dropout_p={dropout_p} inside its operator has no gradient that can be reproduced. "
            "Trace the step with millrace, which makes dropout explicit."
        )
    scores_BHTS = (_wide(query) * _factor(query, scale)) @ _wide(key).mT
    if is_causal:
        later = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(later, -math.inf)
    if mask is None:
        return scores_BHTS
    return scores_BHTS.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores_BHTS + mask


def _weights(scores_BHTS: Tensor, sums_BHT: Tensor) -> Tensor:
    """Softmax from its row sums; zero for a query that sees no key."""
    sums = sums_BHT.masked_fill(sums_BHT == -math.inf, 0.0)
    return torch.exp(scores_BHTS - sums.unsqueeze(-1))


def _factor(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _wide(tensor: Tensor) -> Tensor:
    """As the kernel computes: lower precisions in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
