"""The update of a step divided over several holders of its variables, none of which needs to ask another.

A parameter stays with its optimizer slots, and with whatever else its update reads and changes. Single numbers such as
step counters and learning rates are cheap to have everywhere: every shard that needs one counts for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from millrace.errors import SettingError
from millrace.graph.graph import Graph, feed_key, info
from millrace.graph.passes.extract import ancestors, extract
from millrace.graph.signature import Role, Variable


@dataclass(frozen=True)
class Shard:
    """What one holder has and does.

    graph: the update of its variables; its feeds are the exchanged values that these need.
    variables: all that it holds, the numbers that other shards have as well included.
    exchanged: the names of its feeds, in order.
    """

    graph: Graph
    variables: tuple[str, ...]
    exchanged: tuple[str, ...]


def shards(update: Graph, count: int) -> tuple[Shard, ...]:
    """Divide an update into `count` shards of about equal size in bytes.

    The largest is given out first, each to the shard that has least (Graham, 1969, "Bounds on multiprocessing timing
    anomalies": at most 4/3 of the best division). No tensor is divided: split wide layers first (`partitions`). Shards
    start from the same `initial` tensors; those that live in one process need copies of the numbers they share.

    Args: update: as `halves` makes it. count: at least 1.

    Raises: SettingError when there are fewer parameters than shards, or the update of one needs gradients of others, as
        clipping by the norm of all gradients does; names the node and its line.
    """
    if count < 1:
        raise SettingError(f"an update cannot be divided into {count} shards; expected at least 1")
    needs = _Needs(update)
    groups = _groups(needs)
    if len(groups) < count and count > 1:
        raise _too_few(needs, len(groups), count)
    sizes = {v.name: v.spec.size_bytes for v in update.variables}
    members: list[list[str]] = [[] for _ in range(count)]
    held_bytes = [0] * count
    for group in sorted(groups, key=lambda names: -sum(sizes.get(n, 0) for n in names)):
        least = held_bytes.index(min(held_bytes))
        members[least] += group
        # A group without bytes must not leave another shard empty.
        held_bytes[least] += max(sum(sizes.get(n, 0) for n in group), 1)
    members[0] += [name for name in needs.results if name in needs.numbers and name not in sizes]  # fetched
    return tuple(_shard(update, needs, names) for names in members)


class _Needs:
    """What every result of an update is made of.

    results: new values by variable name, and fetches by "fetch:NAME", as nodes. of: the inputs that each is made of.
    numbers: results that are made of single numbers alone, so that any shard can make them.
    """

    def __init__(self, update: Graph) -> None:
        by_name = {node.name: node for node in update.fx.nodes}
        self.update = update
        self.inputs = update.placeholders()
        self.variables: Mapping[str, Variable] = {v.name: v for v in update.variables}
        self.results: dict[str, Node] = {name: by_name[node] for name, node in update.updates.items()}
        self.results |= {fetch_key(name): by_name[node] for name, node in update.fetches.items()}
        of_node = {node: name for name, node in self.inputs.items()}
        self.of = {name: [of_node[n] for n in ancestors([node]) if n in of_node] for name, node in self.results.items()}
        self.numbers = self._numbers()

    def _numbers(self) -> set[str]:
        parameters = {name for name, v in self.variables.items() if v.role is Role.PARAMETER}
        found = {name for name in self.results if name not in parameters and self.is_number(name)}
        while wrong := {name for name in found if not all(self._copied(n, found) for n in self.of[name])}:
            found -= wrong
        return found

    def is_number(self, name: str) -> bool:
        """Whether the value of a result or an input is 0-dim."""
        node = self.results.get(name) or self.inputs[name]
        return bool(node.meta["val"].ndim == 0)

    def _copied(self, name: str, numbers: set[str]) -> bool:
        return name in numbers or (name not in self.results and self.is_number(name))

    def binding(self, name: str) -> Iterable[str]:
        """The inputs of a result that are to be in one shard only."""
        for source in self.of[name]:
            if source in self.variables:
                if source in self.results and source not in self.numbers:
                    yield source
            elif not self.is_number(source):
                yield source

    def home(self, name: str) -> str:
        """What a result stays with: a slot with its parameter."""
        return self.variables[name].owner if name in self.variables else name


def fetch_key(name: str) -> str:
    """The key of a fetch among results; the prefix keeps it apart from a variable of the same name."""
    return f"fetch:{name}"


def _groups(needs: _Needs) -> list[list[str]]:
    """Results that must be in one shard: those of one parameter, and those that read what another changes."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            name = above
        return name

    bound = [name for name in needs.results if name not in needs.numbers]
    for name in bound:
        home = root(f"home:{needs.home(name)}")
        for source in needs.binding(name):
            parent[root(f"home:{needs.home(source)}" if source in needs.variables else source)] = home
    found: dict[str, list[str]] = {}
    for name in bound:
        found.setdefault(root(f"home:{needs.home(name)}"), []).append(name)
    return list(found.values())


def _shard(update: Graph, needs: _Needs, members: Sequence[str]) -> Shard:
    homes = {needs.home(name) for name in members}
    every = {needs.home(name) for name in needs.results if name not in needs.numbers}
    # Numbers of a parameter go with it, those of no parameter to everybody.
    own = {n for n in needs.numbers if n in needs.variables and (needs.home(n) in homes or needs.home(n) not in every)}
    names = set(members) | own
    while more := {n for name in names for n in needs.of[name] if n in needs.numbers} - names:
        names |= more
    read = {source for name in names for source in needs.of[name]}
    graph = extract(
        update,
        {name: needs.results[fetch_key(name)] for name in update.fetches if fetch_key(name) in names},
        {name: needs.results[name] for name in update.updates if name in names},
        {feed: needs.inputs[feed_key(feed.name)] for feed in update.feeds if feed_key(feed.name) in read},
    )
    # A block of a split layer may be here without the others; here it is a variable like any other.
    graph = graph.with_(variables=tuple(replace(v, part=None) for v in graph.variables))
    return Shard(graph, tuple(v.name for v in graph.variables), tuple(feed.name for feed in graph.feeds))


# -- refusing ----------------------------------------------------------------------------------------------------


def _too_few(needs: _Needs, groups: int, count: int) -> SettingError:
    homes = {needs.home(name) for name in needs.results if name in needs.variables and name not in needs.numbers}
    if len(homes) < count:
        return SettingError(
            f"parameter_servers={count}: the model has {len(homes)} trained tensors, and a server holds at least one. "
            f"Use at most {max(groups, 1)} of them, or split wide layers with partitions=…."
        )
    most = f"at most {groups} servers" if groups > 1 else "one server"
    joins = _first_join(needs)
    where = "the update"
    if joins is not None:
        line = info(joins).line
        where = f"{joins.name!r} ({line})" if line else repr(joins.name)
    return SettingError(
        f"parameter_servers={count}: {where} puts together gradients that would be on different servers (as clipping "
        f"by the norm of all gradients does), so that there can be {most}. Use parameter_servers={max(groups, 1)}, "
        "synchronous replicas without servers, or clip every gradient by value."
    )


def _first_join(needs: _Needs) -> Node | None:
    """The first node that reads what belongs to several parameters."""
    homes: dict[Node, set[str]] = {}
    for name, node in needs.inputs.items():
        if name in needs.variables:
            homes[node] = set() if needs.is_number(name) or name not in needs.results else {needs.home(name)}
        else:  # a gradient belongs to the parameter that it is read for
            homes[node] = {info(user).variable for user in node.users} - {"*", ""}
    for node in needs.update.fx.nodes:
        if node.op != "placeholder" and node.op != "output":
            sources = [homes[n] for n in node.all_input_nodes]
            homes[node] = set().union(*sources)
            if len(homes[node]) > 1 and all(len(source) <= 1 for source in sources):
                return node
    return None
