"""A model that does not fit in the memory of one worker trains over two of them.

Each worker may take 450 MiB. The weights, gradients and AdamW moments of this model need some 650.

Run: python examples/too_big_for_one.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from millrace.errors import MillraceError
from millrace.graph.graph import Graph
from millrace.graph.training import training_graph
from millrace.partition.placed import Planner
from millrace.place.cluster import Cluster
from millrace.place.placement import place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.workers import ProcessWorkers

LIMIT_BYTES = 450 * 2**20


def make_graph() -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1600, 1600) for _ in range(15)))
    batch = torch.randn(8, 1600)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return training_graph(model, lambda m, x: (m(x) - x).square().mean(), optimizer, batch), batch


def train(graph: Graph, batch: Tensor, cluster: Cluster) -> list[float]:
    """The losses of three steps, in workers that get no more memory than the cluster says."""
    planner = Planner(lambda whole: place(whole, cluster, fused=False), fused=False)
    workers = ProcessWorkers(cluster.devices, hold_to_memory=True)
    with PlacedSession(graph, planner, workers, compile="eager") as session:
        losses = [float(session.run(["train", "loss"], batch)[1]) for _ in range(3)]
        for device in cluster.devices:
            mine = [v for v in graph.variables if session.homes[v.name] == device.name]
            print(f"  {device.name} holds {sum(v.spec.size_bytes for v in mine) >> 20} MiB of variables")
    return losses


def main() -> None:
    graph, batch = make_graph()
    needed = sum(v.spec.size_bytes for v in graph.variables)
    print(f"variables: {needed >> 20} MiB; memory of a worker: {LIMIT_BYTES >> 20} MiB")
    both = local_cluster(2)
    both = replace(both, devices=tuple(replace(d, memory_bytes=LIMIT_BYTES, threads=1) for d in both.devices))

    print("one worker:")
    one = Cluster(both.devices[:1])
    try:
        train(graph, batch, one)
    except MillraceError as error:
        print(f"  no: {error}")
    print("one worker, told that it has memory enough:")
    boasting = Cluster((replace(one.devices[0], memory_bytes=2**34),))
    planner = Planner(lambda whole: place(whole, boasting, fused=False), fused=False)
    try:
        workers = ProcessWorkers(one.devices, hold_to_memory=True)
        with PlacedSession(graph, planner, workers, compile="eager") as session:
            session.run(["train", "loss"], batch)
    except MillraceError as error:
        print(f"  no: {str(error).splitlines()[0][:150]}")
    print("two workers:")
    print("  losses", ", ".join(f"{loss:.4f}" for loss in train(graph, batch, both)))


if __name__ == "__main__":
    main()
