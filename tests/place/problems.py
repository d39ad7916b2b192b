"""Problems to place: random ones for properties, and some of the shapes that models and clusters have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from millrace.place.problem import Ints, Problem


@dataclass
class Builder:
    """A problem task by task."""

    groups: int
    memory: list[float]
    latency_s: float = 1e-5
    bytes_per_s: float = 1e10
    shared: bool = False
    group: list[int] = field(default_factory=list)
    microbatch: list[int] = field(default_factory=list)
    backward: list[bool] = field(default_factory=list)
    scratch: list[float] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    producer: list[int] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)

    def task(
        self,
        group: int,
        seconds: Iterable[float],
        reads: Iterable[int],
        *,
        micro: int = 0,
        backward: bool = False,
        scratch: float = 0.0,
    ) -> int:
        """Add a task that reads tensors. Returns its number."""
        number = len(self.group)
        self.group.append(group)
        self.microbatch.append(micro)
        self.backward.append(backward)
        self.scratch.append(scratch)
        self.seconds.append(list(seconds))
        for tensor in dict.fromkeys(reads):
            self.uses[tensor].append(number)
        return number

    def tensor(self, producer: int, size: float) -> int:
        """Add a tensor that a task makes. Returns its number."""
        self.producer.append(producer)
        self.size.append(float(size))
        self.uses.append([])
        return len(self.size) - 1

    def problem(self, resident: Iterable[float] | None = None, pipeline: Ints | None = None) -> Problem:
        """What has been added so far."""
        D = len(self.memory)
        apart = ~np.eye(D, dtype=bool)
        wire = np.full((D, D), -1, dtype=np.int64)
        wire[apart] = 0 if self.shared else np.arange(D * D - D)
        return Problem(
            group_names_G=tuple(f"g{g}" for g in range(self.groups)),
            flops_G=np.bincount(self.group, weights=np.nanmin(self.seconds, axis=1) * 1e12, minlength=self.groups),
            resident_bytes_G=np.zeros(self.groups) if resident is None else np.array(list(resident), dtype=float),
            pipeline_G=np.arange(self.groups) if pipeline is None else pipeline,
            task_names_T=tuple(f"t{t}" for t in range(len(self.group))),
            group_T=np.array(self.group),
            microbatch_T=np.array(self.microbatch),
            backward_T=np.array(self.backward),
            scratch_bytes_T=np.array(self.scratch, dtype=float),
            seconds_TD=np.array(self.seconds, dtype=float),
            producer_K=np.array(self.producer, dtype=np.int64),
            bytes_K=np.array(self.size, dtype=float),
            wire_bytes_K=np.array(self.size, dtype=float),
            first_use_K1=np.concatenate([[0], np.cumsum([len(u) for u in self.uses])]).astype(np.int64),
            uses_C=np.array([t for use in self.uses for t in use], dtype=np.int64),
            device_names_D=tuple(f"/host:0/gpu:{d}" for d in range(D)),
            memory_bytes_D=np.array(self.memory, dtype=float),
            latency_s_DD=np.where(apart, self.latency_s, 0.0),
            bytes_per_s_DD=np.where(apart, self.bytes_per_s, np.inf),
            wire_DD=wire,
        )


def step_of(
    parents: list[list[int]],
    flops: list[float],
    output_bytes: list[float],
    rates: list[float],
    memory: list[float],
    *,
    microbatches: int = 1,
    resident: list[float] | None = None,
    allowed: dict[int, list[int]] | None = None,
    latency_s: float = 1e-5,
    bytes_per_s: float = 1e10,
    shared: bool = False,
) -> Problem:
    """Forward, backward and update of groups that read what their `parents` (groups with lower numbers) make.

    flops and output_bytes are of the forward pass of a whole batch. Backward takes twice as long, and reads what the
    forward task of its group read.
    """
    G = len(parents)
    build = Builder(G, memory, latency_s, bytes_per_s, shared)
    readers: list[list[int]] = [[] for _ in range(G)]
    for g, before in enumerate(parents):
        for p in before:
            readers[p].append(g)

    def seconds(g: int, work: float) -> list[float]:
        may = (allowed or {}).get(g, list(range(len(rates))))
        return [work / rate if d in may else np.inf for d, rate in enumerate(rates)]

    gradients: list[list[int]] = [[] for _ in range(G)]
    for m in range(microbatches):
        outputs, to_parent = [], {}
        for g in range(G):
            task = build.task(g, seconds(g, flops[g] / microbatches), [outputs[p] for p in parents[g]], micro=m)
            outputs.append(build.tensor(task, output_bytes[g] // microbatches))
        for g in reversed(range(G)):
            reads = [outputs[p] for p in parents[g]] + [outputs[g]] + [to_parent[r, g] for r in readers[g]]
            reads += gradients[g][-1:]  # sums of gradients go from one microbatch to the next
            task = build.task(g, seconds(g, 2 * flops[g] / microbatches), reads, micro=m, backward=True)
            for p in parents[g]:
                to_parent[g, p] = build.tensor(task, output_bytes[p] // microbatches)
            gradients[g].append(build.tensor(task, resident[g] // 3 if resident else 8))
    for g in range(G):
        build.task(g, seconds(g, flops[g] / 100), gradients[g][-1:])
    return build.problem(resident)


def chain(groups: int = 24, microbatches: int = 4, rates: tuple[float, ...] = (1e13,) * 4, **more: object) -> Problem:
    """Equal layers, one after the other."""
    D = len(rates)
    settings = {"memory": [64e9] * D, "resident": [100_000_000.0] * groups, **more}
    memory, resident = settings.pop("memory"), settings.pop("resident")
    return step_of(
        [[g - 1] if g else [] for g in range(groups)],
        [4e10] * groups,
        [16_000_000.0] * groups,
        list(rates),
        memory,
        resident=resident,
        microbatches=microbatches,
        **settings,  # type: ignore[arg-type]
    )


def branchy(
    branches: int = 4,
    depth: int = 4,
    blocks: int = 3,
    rates: tuple[float, ...] = (1e13,) * 4,
    seed: int = 0,
    **more: object,
) -> Problem:
    """Blocks of parallel branches of uneven work, joined after each block (Inception, mixtures of experts)."""
    random = np.random.default_rng(seed)
    parents: list[list[int]] = [[]]
    flops, size = [1e10], [8_000_000.0]
    for _ in range(blocks):
        root, ends = len(parents) - 1, []
        for _ in range(branches):
            last = root
            for _ in range(depth):
                parents.append([last])
                flops.append(float(random.uniform(0.5, 8) * 1e10))
                size.append(float(random.integers(2, 16) * 1_000_000))
                last = len(parents) - 1
            ends.append(last)
        parents.append(ends)
        flops.append(5e9)
        size.append(8_000_000.0)
    settings = {"memory": [64e9] * len(rates), **more}
    memory = settings.pop("memory")
    resident = [20_000_000.0] * len(parents)
    return step_of(parents, flops, size, list(rates), memory, resident=resident, **settings)  # type: ignore[arg-type]


def big_embedding(microbatches: int = 1) -> Problem:
    """A table that only the host's memory holds, under a model that only the GPU runs fast. Devices: GPU, CPU."""
    parents = [[], [0], [1], [2], [3], [4]]
    flops = [1e7, 5e10, 5e10, 5e10, 5e10, 1e10]
    resident = [40e9, 2e8, 2e8, 2e8, 2e8, 1e9]
    size = [4_000_000.0, *[16_000_000.0] * 4, 1_000_000.0]
    return step_of(
        parents,
        flops,
        size,
        [2e13, 5e11],
        [16e9, 128e9],
        microbatches=microbatches,
        resident=resident,
        bytes_per_s=2e10,
    )


@st.composite
def problems(
    draw: st.DrawFn, groups: int = 6, tasks: int = 14, devices: int = 4, tight: bool = False, forbid: bool = True
) -> Problem:
    """Any graph of tasks: integer bytes, so that sums are exact in any order; some tensors are narrowed on the
    wire, and some devices send without a wire, by themselves."""
    D = draw(st.integers(1, devices))
    G = draw(st.integers(1, groups))
    T = draw(st.integers(G, tasks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    limit = float(random.integers(100, 2000)) if tight else 1e9
    build = Builder(G, [limit] * D, shared=draw(st.booleans()))
    owner = np.concatenate([np.arange(G), random.integers(0, G, T - G)])
    random.shuffle(owner)
    only_G = {g: int(random.integers(D)) for g in range(G) if forbid and random.random() < 0.2}
    for t in range(T):
        g = int(owner[t])
        seconds = random.uniform(1e-3, 1e-2, D)
        seconds[[d for d in range(D) if d != only_G.get(g, d)]] = np.inf
        backward = bool(t >= T // 2)
        reads = [k for k in range(len(build.size)) if random.random() < 2.0 / (1 + len(build.size))]
        micro = int(random.integers(3))
        task = build.task(g, seconds, reads, micro=micro, backward=backward, scratch=float(random.integers(50)))
        for _ in range(int(random.integers(3))):
            build.tensor(task, int(random.integers(1, 100)))
    problem = build.problem([float(random.integers(0, 100)) for _ in range(G)], random.permutation(G))
    problem.wire_bytes_K[random.random(len(problem.wire_bytes_K)) < 0.3] //= 4
    apart = ~np.eye(D, dtype=bool)
    problem.latency_s_DD[apart] = random.uniform(1e-5, 1e-3, D * D - D)
    problem.bytes_per_s_DD[apart] = random.uniform(1e4, 1e6, D * D - D)
    if draw(st.booleans()):  # some senders do the work of sending
        problem.wire_DD[random.random(D) < 0.5] = -1
    return problem
