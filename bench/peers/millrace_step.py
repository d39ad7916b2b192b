"""Millrace: the whole step as one graph, run by a session.

Options: `compile` is the session's tier ("tiered" waits until the compiled step is swapped in), `steps_per_call` runs
that many steps in one call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.models import compute_loss, device_memory, load, make_optimizer, versions
from bench.protocol import Peer, serve
from millrace.graph.training import training_graph
from millrace.runtime.session import Session
from millrace.version import __version__

FETCHES = ("train", "loss")


def build(task: dict[str, Any]) -> Peer:
    workload, model, batch = load(task)
    optimizer = make_optimizer(workload, model)
    tier = task["options"].get("compile", "inductor")
    per_call = task["options"].get("steps_per_call", 1)
    said: list[str] = []
    sessions: list[Session] = []

    def prepare() -> None:
        graph = training_graph(model, compute_loss, optimizer, batch, precision=task["precision"])
        sessions.append(Session(graph, compile=tier, say=said.append))

    def run(steps: int) -> Tensor:
        session = sessions[0]
        for _ in range(steps // per_call):
            if per_call == 1:
                _, loss = session.run(FETCHES, batch)
            else:
                loss = session.run_steps(FETCHES, [batch] * per_call)[1][-1]
        if tier == "tiered" and session.last_tier == "eager":
            session.tier(FETCHES, batch, wait=True)
        return loss

    def read(loss: Tensor) -> float:
        peer.notes |= {"tier": sessions[0].last_tier, "said": said}
        return float(loss)

    peer = Peer(
        run, read, {**versions(), "millrace": __version__}, prepare, steps_per_call=per_call, **device_memory(task)
    )
    return peer


if __name__ == "__main__":
    serve(build)
