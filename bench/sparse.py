"""python -m bench.sparse: a step of training an embedding on parameter servers, for tables of 1 MB to 4 GB.

A whole asynchronous step, as `fit` takes it: the driver hands out a batch, a worker fetches the rows that it names from
one of two servers, computes, and pushes their gradients, with which the server updates its table by plain SGD. One size
after the other, each in processes of its own, twice in opposite orders; the best of all turns counts, as other work on
the machine only makes steps longer. For comparison the same step with momentum, whose table travels whole, up to
`--whole` bytes. Prints a JSON line for each: milliseconds of a step, and how many times that with the smallest table.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.graph.graph import TRAIN
from millrace.graph.training import training_graph
from millrace.optim import momentum, sgd
from millrace.replicas.hub import Hub
from millrace.replicas.server_session import ServerSession
from millrace.replicas.settings import Async
from millrace.runtime.launch import ProcessLauncher

WIDTH = 64
BATCH, LENGTH = 64, 8  # at most 512 rows in a step


def turns_ms(table_bytes: int, turns: int, steps: int, *, whole: bool) -> list[float]:
    """Milliseconds of a step, in several turns of one session."""
    height = table_bytes // (4 * WIDTH)
    zeros = torch.from_numpy(numpy.zeros((height, WIDTH), numpy.float32))  # take no memory in this process
    table = nn.Embedding.from_pretrained(zeros, freeze=False)
    model = nn.ModuleDict({"table": table, "out": nn.Linear(WIDTH, 16)})

    def loss(net: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net["out"](net["table"](batch[0]).mean(1)), batch[1])

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randint(height, (BATCH, LENGTH)), torch.randint(16, (BATCH,))

    graph = training_graph(model, loss, momentum(0.1) if whole else sgd(0.1), batch(), seed=0)
    directory = tempfile.TemporaryDirectory(prefix="millrace-")
    launcher = ProcessLauncher("millrace.replicas.member", [], 1, Path(directory.name))
    hub = Hub(launcher, secrets.token_bytes(32), Path(directory.name), lambda line: None)
    update = Async(parameter_servers=2, copies=False)
    found = []
    with ServerSession(graph, hub, update, replicas=1, spares=0, compile="eager", directory=directory) as session:
        assert bool(session.tables) != whole
        for turn in range(turns + 1):
            batches = [batch() for _ in range(steps if turn else 5)]
            start_s = time.perf_counter()
            for _ in session.stream([TRAIN], batches):
                pass
            found.append((time.perf_counter() - start_s) / len(batches) * 1e3)
    return found[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    options = argparse.ArgumentParser(prog="python -m bench.sparse", description=__doc__)
    options.add_argument("--tables", type=int, nargs="+", default=[2**20, 2**24, 2**28, 2**30, 2**32], help="bytes")
    options.add_argument("--whole", type=int, default=2**28, help="the largest that travels whole for comparison")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--steps", type=int, default=200, help="in a turn")
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    rows: dict[int, list[float]] = {size: [] for size in given.tables}
    for size in (*given.tables, *reversed(given.tables)):
        rows[size] += turns_ms(size, given.turns, given.steps, whole=False)
    least_ms = min(rows[given.tables[0]])
    kinds = {"rows": rows}
    kinds["whole"] = {s: turns_ms(s, 2, 5, whole=True) for s in given.tables if s <= given.whole}
    for kind, sizes in kinds.items():
        for size, found in sizes.items():
            figure = {"name": f"sparse/{kind}", "table_bytes": size, "ms": round(min(found), 3)}
            print(json.dumps({**figure, "times_smallest": round(min(found) / least_ms, 2), "turns": len(found)}))


if __name__ == "__main__":
    main()
