"""Random placements and orders of graphs, what they compute in one piece, and an exchange between threads."""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.compile.in_place import assigned
from millrace.errors import WorkerError
from millrace.graph.graph import Graph
from millrace.partition.cut import cut
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.partition.program import Partition
from millrace.runtime.device import DeviceRunner


class Mailbox:
    """All devices of one process: what was sent this step, by edge."""

    def __init__(self) -> None:
        self._arrived: dict[int, Tensor] = {}
        self._condition = threading.Condition()

    def send(self, edge: int, tensor: Tensor) -> None:
        with self._condition:
            assert edge not in self._arrived, "an edge carries one tensor a step"
            self._arrived[edge] = tensor.clone()
            self._condition.notify_all()

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        with self._condition:
            if not self._condition.wait_for(lambda: edge in self._arrived, timeout_s):
                raise WorkerError(f"edge {edge} did not come")
            return self._arrived[edge]


def run_partition(
    partition: Partition, initial: Mapping[str, Tensor], feeds: Mapping[str, Tensor], steps: int, compile: str = "eager"
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Every step's fetches, and the variables after the last; one thread a device."""
    variables = {name: initial[name].detach().clone() for name in partition.homes}
    runners = [DeviceRunner(p, partition.edges, variables, compile=compile) for p in partition.programs.values()]
    fetched = []
    for _ in range(steps):
        exchange, results, errors = Mailbox(), dict[str, dict[str, Tensor]](), list[BaseException]()

        def work(runner: DeviceRunner, exchange: Mailbox, results: dict, errors: list[BaseException]) -> None:
            try:
                given = {name: feeds[name] for name in runner.program.feeds}
                results[runner.program.device] = runner.step(given, exchange, timeout_s=20.0)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(r, exchange, results, errors)) for r in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        fetched.append(
            {
                name: feeds[value] if device == "" else results[device][value]
                for name, (device, value) in partition.fetches.items()
            }
        )
    return fetched, variables


def whole(graph: Graph, feeds: Sequence[Tensor], steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The fetches of every step and the variables after the last, of the graph in one piece, with nothing reused."""
    variables = [graph.initial[v.name].detach().clone() for v in graph.variables]
    run, fetched = torch.no_grad()(assigned(graph).forward), []
    for _ in range(steps):
        fetched.append({n: t.clone() for n, t in zip(graph.fetches, run(*variables, *feeds), strict=True)})
    return fetched, {v.name: t for v, t in zip(graph.variables, variables, strict=True)}


def random_partition(graph: Graph, devices: Sequence[str], seed: int) -> Partition:
    """A graph cut at random: which of the devices have what, in which order they work, where variables live."""
    chance = random.Random(seed)
    some = chance.sample(devices, chance.randint(1, len(devices)))
    device_of = random_placement(graph, some, seed)
    if chance.random() < 0.3:  # as layers are, rather than node by node
        names = list(device_of)
        ends = sorted(chance.sample(range(len(names)), min(2, len(names))))
        device_of = {name: some[sum(end <= at for end in ends) % len(some)] for at, name in enumerate(names)}
    pieces = greedy_pieces(graph, device_of) if chance.random() < 0.4 else random_pieces(graph, device_of, seed)
    homes = {v.name: chance.choice(some) for v in graph.variables if chance.random() < 0.4}
    return cut(graph, pieces, homes if chance.random() < 0.5 else None)


def random_placement(graph: Graph, devices: Sequence[str], seed: int) -> dict[str, str]:
    """A device for every node, each alone."""
    chance = random.Random(seed)
    return {node.name: chance.choice(devices) for node in graph.nodes}


def random_pieces(graph: Graph, device_of: Mapping[str, str], seed: int) -> list[Piece]:
    """The nodes in a random order in which they can run; neighbours of one device are at times one piece."""
    chance = random.Random(seed)
    waiting = {node: sum(a.op == "call_function" for a in node.all_input_nodes) for node in graph.nodes}
    ready = [node for node in graph.nodes if not waiting[node]]
    order = []
    while ready:
        node = ready.pop(chance.randrange(len(ready)))
        order.append(node)
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)
    pieces: list[Piece] = []
    made: dict[str, int] = {}
    for node in order:
        producer = node
        while producer.target is operator.getitem:
            producer = producer.args[0]
        if producer is not node:  # picks go with what they pick from
            index = made[producer.name]
            pieces[index] = Piece(pieces[index].name, pieces[index].device, (*pieces[index].nodes, node.name))
            continue
        device = device_of[node.name]
        if pieces and pieces[-1].device == device and chance.random() < 0.5:
            pieces[-1] = Piece(pieces[-1].name, device, (*pieces[-1].nodes, node.name))
        else:
            pieces.append(Piece(str(len(pieces)), device, (node.name,)))
        made[node.name] = len(pieces) - 1
    return pieces
