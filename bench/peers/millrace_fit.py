"""Millrace's `fit` with its defaults (tiered, a run directory, progress): each "run" is one call of `fit`.

Option: `compile`, the tier.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

from bench.models import compute_loss, device_memory, load, make_optimizer, versions
from bench.protocol import Peer, serve
from millrace.train.callbacks import Callback
from millrace.train.fit import fit
from millrace.version import __version__


class Watch(Callback):
    """When the first step ended, and the last loss, as seen from outside."""

    def __init__(self) -> None:
        self.first_step_at_s = 0.0
        self.loss = float("nan")

    def on_step(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        self.loss = float(values["loss"])
        self.first_step_at_s = self.first_step_at_s or time.perf_counter()


def build(task: dict[str, Any]) -> Peer:
    workload, model, batch = load(task)
    optimizer = make_optimizer(workload, model)
    peer: Peer

    def run(steps: int) -> float:
        watch = Watch()
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
            start_s = time.perf_counter()
            fit(
                model,
                [batch],
                loss=compute_loss,
                optimizer=optimizer,
                steps=steps,
                compile=task["options"].get("compile", "tiered"),
                precision=task["precision"],
                run_dir=f"{directory}/run",
                callbacks=[watch],
            )
        peer.notes.setdefault("first_step_s", watch.first_step_at_s - start_s)
        return watch.loss

    peer = Peer(run, float, {**versions(), "millrace": __version__}, **device_memory(task))
    return peer


if __name__ == "__main__":
    serve(build)
