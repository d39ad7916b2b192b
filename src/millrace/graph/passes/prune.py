"""Keep only what some fetches and updates need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millrace.errors import FetchError, did_you_mean
from millrace.graph.graph import TRAIN, Graph, copy_fx, set_output, step_module


def prune(graph: Graph, fetches: Sequence[str], updates: Iterable[str]) -> Graph:
    """The part of `graph` that computes `fetches` and the new values of the variables `updates`.

    A fetch is a name from `graph.fetches`, a variable's name (its value before the step) or any node's name. The
    signature's inputs all stay, so that a pruned graph is called like the whole one.

    Raises: FetchError for an unknown name, with the nearest ones.
    """
    fx, mapping = copy_fx(graph.module)
    by_name = {old.name: new for old, new in mapping.items()}
    nodes = {fetch: by_name[resolve(graph, fetch)] for fetch in fetches}
    chosen = {name: by_name[graph.updates[name]] for name in updates}
    set_output(fx, [*nodes.values(), *chosen.values()])
    fx.eliminate_dead_code()
    return graph.with_(
        module=step_module(graph.module, fx),
        fetches={fetch: node.name for fetch, node in nodes.items()},
        updates={name: node.name for name, node in chosen.items()},
    )


def resolve(graph: Graph, fetch: str) -> str:
    """The node name that a fetch means. Raises FetchError with the nearest names."""
    if fetch in graph.fetches:
        return graph.fetches[fetch]
    inputs = graph.placeholders()
    if fetch in inputs:
        return inputs[fetch].name
    names = {node.name for node in graph.fx.nodes if node.op in ("call_function", "placeholder")}
    if fetch in names:
        return fetch
    known = [*graph.fetches, TRAIN, *(v.name for v in graph.variables), *names]
    raise FetchError(
        f"nothing to fetch is called {fetch!r}. {did_you_mean(fetch, known)} "
        f"The step returns {sorted(graph.fetches)}; any variable or node name of `print(graph)` can be fetched, too."
    )
