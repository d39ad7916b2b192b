"""Random graphs cut at random, on worker processes with shared memory between them: the bits of the graph in one piece.

`tests/partition/test_cut.py` has many more, between threads. The workers are started once for all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.graph.programs import Program, deep_graph, equal_bits, feeds_of, programs
from tests.partition.cases import random_partition, whole
from tests.partition.test_cut import awkward, batch_norm, in_parts
from torch import Tensor

from millrace.graph.graph import Graph, feed_key
from millrace.partition.files import save_program
from millrace.partition.program import Partition
from millrace.place.cluster import Device
from millrace.runtime.messages import Message
from millrace.runtime.workers import ProcessWorkers

DEVICES = tuple(f"/host:0/cpu:{i}" for i in range(3))
SOON_S = 60.0
STEPS = 2


@dataclass
class Group:
    """Worker processes that take one program after the other."""

    workers: ProcessWorkers = field(
        default_factory=lambda: ProcessWorkers([Device(name, "cpu", 1 << 30, {}) for name in DEVICES])
    )
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count())

    def load(self, partition: Partition) -> int:
        """Give every device its program."""
        key = next(self.numbers)
        base = self.workers.directory / f"case-{key}"
        meeting = base / "meeting"
        meeting.mkdir(parents=True, mode=0o700)
        messages = {}
        for number, (device, program) in enumerate(partition.programs.items()):
            save_program(program, partition.edges, base / str(number))
            where = {"directory": str(base / str(number)), "meeting": str(meeting), "transport": "shared_memory"}
            how = {"devices": list(partition.programs), "compile": "eager", "timeout_s": SOON_S}
            messages[device] = Message("program", {"key": key, **where, **how})
        self.workers.ask(messages, SOON_S)
        return key

    def run(
        self, partition: Partition, initial: Mapping[str, Tensor], feeds: Mapping[str, Tensor], first_step: int
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Every step's fetches, and the variables after the last."""
        homes: dict[str, list[str]] = {}
        for name, home in partition.homes.items():
            homes.setdefault(home, []).append(name)
        values = {home: {name: initial[name] for name in names} for home, names in homes.items()}
        self.workers.ask({home: Message("write", {}, tensors) for home, tensors in values.items()}, SOON_S)
        key = self.load(partition)
        fetched = []
        for step in range(first_step, first_step + STEPS):
            fields = {"key": key, "step": step, "timeout_s": SOON_S, "timeline": False}
            messages = {
                device: Message("step", fields, {name: feeds[name] for name in program.feeds})
                for device, program in partition.programs.items()
            }
            answers = self.workers.ask(messages, SOON_S)
            found = {
                name: answers[device].tensors[value] if device else feeds[value]
                for name, (device, value) in partition.fetches.items()
            }
            fetched.append(found)
        messages = {home: Message("read", {"names": names}) for home, names in homes.items()}
        answers = self.workers.ask(messages, SOON_S)
        return fetched, {name: tensor for answer in answers.values() for name, tensor in answer.tensors.items()}


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.workers.close()


def same(group: Group, graph: Graph, seed: int) -> None:
    """Assert that a random cut of the graph gives the same bits on processes."""
    partition = random_partition(graph, DEVICES, seed)
    feeds = feeds_of(graph, seed)
    by_name = {feed_key(f.name): t for f, t in zip(graph.feeds, feeds, strict=True)}
    first_step = random.Random(seed).randrange(1000)
    fetched, variables = group.run(partition, graph.initial, by_name, first_step)
    expected, changed = whole(graph, feeds, STEPS)
    for one, other in zip(fetched, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert equal_bits([one[name]], [other[name]]), name
    for name, value in changed.items():
        assert equal_bits([variables[name]], [value]), name


# Without shrinking: an example that fails ends the workers.
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(program=programs, seed=st.integers(0, 2**32))
def test_random_programs_give_the_same_bits_on_processes(group: Group, program: Program, seed: int) -> None:
    graph = program.graph()
    for index in range(2):
        same(group, graph, seed + index)


@pytest.mark.parametrize("make", [awkward, batch_norm, deep_graph, in_parts])
@pytest.mark.parametrize("seed", range(3))
def test_awkward_graphs_give_the_same_bits_on_processes(group: Group, make: type[Graph], seed: int) -> None:
    same(group, make(), seed)
