"""Null steps with millrace's parameter servers: a process for each shard and each worker. `bench.null_step` starts it.

A shard updates with plain SGD, of rows alone in a table. A worker copies what it fetches into
tensors of its own and pushes zeros that lie in tensors of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.peers.null_common import ROW_WIDTH, follow, serve_turns
from millrace.graph.passes.row_update import row_update
from millrace.graph.trace import trace
from millrace.replicas.server import ShardServer
from millrace.replicas.server_client import ShardClient
from millrace.replicas.shard_clients import ShardClients
from millrace.replicas.shard_events import Async
from millrace.replicas.shard_store import Rows, ShardStore
from millrace.runtime import handshake


def be_shard(task: dict[str, Any]) -> None:
    """Serve until the other side of the standard input is closed."""
    number, name = task["number"], f"v{task['number']}"
    count = max(1, task["size_bytes"] // task["shards"] // 4)
    sparse = task["case"] == "rows"
    variables = {name: torch.zeros(count // ROW_WIDTH, ROW_WIDTH) if sparse else torch.zeros(count)}
    update = trace(sgd, variables, {f"gradient/{name}": torch.zeros_like(variables[name])})
    store = ShardStore(f"shard {number}", variables, row_update(update, {name: 2}) if sparse else update)
    del variables
    server = ShardServer(store, Async())
    listener = handshake.listen(task["addresses"][number])
    threading.Thread(target=server.serve, args=(listener, bytes.fromhex(task["token"])), daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()


def sgd(held: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One update."""
    for name, gradient in gradients.items():
        held[name.removeprefix("gradient/")].sub_(gradient, alpha=0.1)
    return {}


def be_worker(task: dict[str, Any]) -> None:
    """Take null steps when told to."""
    shards = ShardClients(
        [ShardClient(a, f"w{task['number']}", bytes.fromhex(task["token"])) for a in task["addresses"]]
    )
    step = row_step(shards, task) if task["case"] == "rows" else dense_step(shards)

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    follow(run)


def dense_step(shards: ShardClients) -> Callable[[], None]:
    """Fetch all variables, push zeros for all."""
    specs = {name: spec for client in shards.clients for name, spec in client.variables.items()}
    own = {name: torch.empty(spec.shape) for name, spec in specs.items()}
    zeros = {f"gradient/{name}": torch.zeros(spec.shape) for name, spec in specs.items()}
    sequence = 0

    def step() -> None:
        nonlocal sequence
        sequence += 1
        shards.push(zeros, sequence, sequence, shards.fetch(own))

    return step


def row_step(shards: ShardClients, task: dict[str, Any]) -> Callable[[], None]:
    """Fetch some rows of every table, push zeros for them."""
    count = task["rows"] // task["shards"]
    tables = {name: spec.shape[0] for client in shards.clients for name, spec in client.tables.items()}
    generator = torch.Generator().manual_seed(task["number"])
    sequence, zeros = 0, torch.zeros(count, ROW_WIDTH)
    found = {name: torch.empty(count, ROW_WIDTH) for name in tables}

    def step() -> None:
        nonlocal sequence
        sequence += 1
        wanted = {name: torch.randint(rows, (count,), generator=generator) for name, rows in tables.items()}
        versions = shards.fetch({}, rows={t: Rows(r, found[t]) for t, r in wanted.items()})
        shards.push({}, sequence, 0, versions, rows={t: Rows(r, zeros) for t, r in wanted.items()})

    return step


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    if "role" in task:
        {"shard": be_shard, "worker": be_worker}[task["role"]](task)
        return
    children: list[subprocess.Popen[str]] = []

    def start(role: str, count: int) -> list[subprocess.Popen[str]]:
        made = []
        for number in range(count):
            full = json.dumps({**task, "role": role, "number": number})
            command = [sys.executable, "-m", "bench.peers.null_millrace", full]
            made.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        children.extend(made)
        for child in made:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise SystemExit(f"a {role} ended with {child.wait()}")
        return made

    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
        task["token"] = handshake.new_token().hex()
        task["addresses"] = [f"unix:{Path(directory) / str(number)}" for number in range(task["shards"])]
        try:
            start_s = time.perf_counter()
            start("shard", task["shards"])
            workers = start("worker", task["workers"])
            serve_turns(workers, {"start_s": round(time.perf_counter() - start_s, 2)})
        finally:
            for child in children:
                child.kill()
                child.wait()


if __name__ == "__main__":
    main()
