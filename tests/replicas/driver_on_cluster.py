"""A driver for tests: trains over replicas on a Ray cluster until its standard input ends. Says in lines of JSON what
happens, and when on the clock that all processes of a machine share.

As a process: `python driver_on_cluster.py ADDRESS sync|async DIRECTORY`.
"""

from __future__ import annotations

import importlib
import json
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import nn

from millrace import Callback, fit
from millrace.replicas.hub import Event, Hub, Joined, Lost
from millrace.replicas.settings import Async, Sync, Update
from millrace.train.callbacks import RunView
from millrace.train.replicas import ReplicaRun

UPDATES: dict[str, Update] = {"sync": Sync(), "async": Async(parameter_servers=1)}
REPLICAS = {"sync": 4, "async": 2}
SPARES = 1
_LEAST_STEP_S = 0.01
sessions: list[Any] = []


def tell(**what: object) -> None:
    print(json.dumps({"at_s": time.monotonic(), **what}), flush=True)


class TellingHub(Hub):
    """Tells who has come and gone when the driver learns it."""

    def next(self, timeout_s: float) -> Event | None:
        """See `Hub.next`."""
        event = super().next(timeout_s)
        match event:
            case Joined(member, host=host):
                tell(joined=member, host=host)
            case Lost(member, why):
                tell(lost=member, why=why)
        return event


class TellingRun(ReplicaRun):
    """Keeps its session where `Tell` finds it."""

    def session(self, graph: Any) -> Any:
        """See `ReplicaRun.session`."""
        sessions.append(super().session(graph))
        return sessions[-1]


class Tell(Callback):
    """Tells of every step, and ends the run with the standard input."""

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """After a step."""
        session = sessions[-1]
        servers = [*session.holders, *session.copy_holders] if hasattr(session, "holders") else []
        workers = list(session.workers)
        tell(step=step, loss=float(values["loss"]), complete=session.complete, workers=workers, servers=servers)
        if select.select([sys.stdin], [], [], 0.0)[0]:
            run.stop()
        time.sleep(_LEAST_STEP_S)


def main(address: str, update: str, directory: Path) -> None:
    importlib.import_module("millrace.train.replicas").Hub = TellingHub  # type: ignore[attr-defined]
    importlib.import_module("millrace.train.fit").ReplicaRun = TellingRun  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    targets = torch.tanh(inputs @ torch.randn(16, 4))
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    result = fit(
        model,
        (inputs, targets),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        batch_size=64,
        steps=10**6,
        checkpoint_every=10**6,
        compile="eager",
        progress=False,
        run_dir=directory,
        replicas=REPLICAS[update],
        spares=SPARES,
        update=UPDATES[update],
        cluster=address,
        imports=["late_host"],
        callbacks=[Tell()],
    )
    tell(ended=True, steps=result.steps, restarts=result.restarts)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
