"""Train one model over two worker processes, without a change to it; look at what was decided and what it took.

Run: python examples/two_devices.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from millrace.graph.training import training_graph
from millrace.partition.placed import Planner
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.place.placement import place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.timeline import measured_spans
from millrace.runtime.workers import ProcessWorkers


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def main(steps: int = 60, out: Path = Path("timeline")) -> float:
    """Train, and write the expected and the measured timeline of a step; returns the last accuracy."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    graph = training_graph(model, loss, optimizer, (images[:256], labels[:256]))

    cluster = local_cluster(2)
    hints = {"0": "cpu:0", "4": "cpu:1"}  # the rest is up to the search
    planner = Planner(lambda graph: place(graph, cluster, hints))
    accuracy = 0.0
    with PlacedSession(graph, planner, ProcessWorkers(cluster.devices), microbatches=4) as session:
        for step in range(steps):
            picked = torch.randint(len(images), (256,))
            _, value, hits = session.run(["train", "loss", "accuracy"], (images[picked], labels[picked]))
            accuracy = float(hits)
            if step % 20 == 0:
                print(f"step {step:3}  loss {float(value):.3f}  accuracy {accuracy:.3f}")
        session.watch_time = True
        session.run(["train", "loss", "accuracy"], (images[:256], labels[:256]))
        assert planner.placement is not None
        assert session.timeline is not None
        print(planner.placement.plan.note)
        print(f"between the devices: {session.wire_bytes()}")  # PlacedSession(…, wire="bfloat16") would halve it
        write_trace(expected_spans(planner.placement), out.with_suffix(".expected.json"), "expected")
        write_trace(measured_spans(session.timeline), out.with_suffix(".measured.json"), "measured")
        session.pull()  # the weights are the model's own again
    print(f"accuracy {accuracy:.3f}; open {out}.*.json at ui.perfetto.dev")
    return accuracy


if __name__ == "__main__":
    main()
