"""A program that trains and is killed, again and again; `test_resume.py` runs it.

    run_to_kill.py DIRECTORY KILLS SEED SCENARIO…        is killed at random moments
    run_to_kill.py DIRECTORY KILLS SEED --save SCENARIO… is killed while a checkpoint is being written

Of each scenario it first trains one run without a kill. Then it forks victims that train another, each of which resumes
what the one before has left, and prints one JSON object: how often they died, and where the two runs differ. Forking
costs milliseconds where a new Python with torch costs seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import millrace
from millrace import EarlyStopping, RunDirectory
from millrace.data import as_batches, mapped, text_batches

INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(1)


def network(seed: int = 0) -> nn.Module:
    """With everything that a checkpoint must hold: parameters, buffers that change, random masks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


class Noisy(Dataset[Any]):
    """Examples with noise from the global generator, in whatever process reads them."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + 0.1 * torch.randn(4), LABELS[index]


class Countable(IterableDataset[Any]):
    """A stream that can save its place."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(LABELS):
            self.at += 1
            yield INPUTS[self.at - 1], LABELS[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


def stream() -> Iterator[Any]:
    """Batches with noise; no length, and read again for every epoch."""
    for start in range(0, len(LABELS), 8):
        yield INPUTS[start : start + 8] + 0.1 * torch.randn(8, 4), LABELS[start : start + 8]


def table() -> Any:
    return datasets.Dataset.from_dict({"x": INPUTS.tolist(), "y": LABELS.tolist()})


def augmented() -> Any:
    batches = as_batches((INPUTS, LABELS), batch_size=8, seed=3)
    return mapped(batches, lambda batch, g: (batch[0] + torch.randn(8, 4, generator=g), batch[1]), seed=4)


def words() -> Any:
    return text_batches(torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(2)), 4, 12, seed=1)


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding, self.rnn, self.head = nn.Embedding(5, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0]).flatten(0, 1)


def text_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["targets"].flatten())


# What `fit` is called with, made anew for every run, as a new process would make it.
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "arrays": lambda: {
        "data": (INPUTS, LABELS), "batch_size": 8, "accumulate": 3, "checkpoint_every": 2, "evaluate_every": 3,
        "schedule": lambda step: 1 / (1 + step), "validation": (INPUTS, LABELS), "keep_last": 1,
    },
    "epochs": lambda: {
        "data": (INPUTS, LABELS), "batch_size": 8, "validation": (INPUTS, LABELS), "checkpoint_every": 6,
        "early_stopping": EarlyStopping("accuracy", patience=50, mode="max"), "optimizer": millrace.optim.adamw(0.05),
    },
    "calls": lambda: {"data": (INPUTS, LABELS), "batch_size": 8, "steps_per_call": 4, "checkpoint_every": 7},
    "loader": lambda: {"data": DataLoader(Noisy(), 8, shuffle=True), "checkpoint_every": 5},
    "workers": lambda: {"data": DataLoader(Noisy(), 8, shuffle=True, num_workers=2), "checkpoint_every": 4},
    "stateful": lambda: {"data": StatefulDataLoader(Countable(), 8, num_workers=1), "checkpoint_every": 4},
    "stream": lambda: {"data": stream, "validation": stream, "checkpoint_every": 4},
    "table": lambda: {
        "data": table(), "batch_size": 8, "checkpoint_every": 5, "optimizer": millrace.optim.momentum(0.05),
    },
    "augmented": lambda: {"data": augmented(), "checkpoint_every": 3},
    "text": lambda: {
        "data": words(), "model": Characters(), "loss": text_loss, "checkpoint_every": 5,
        "optimizer": millrace.optim.adamw(0.01, clip_norm=1.0),
    },
}  # fmt: skip


class Slow(millrace.Callback):
    """Steps of a millisecond would hardly ever be met by a kill."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s

    def on_step(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        time.sleep(self._pause_s)


def train(scenario: str, directory: Path, pause_s: float) -> None:
    options = SCENARIOS[scenario]()
    model = options.pop("model", None) or network()
    options = {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.05), "loss": loss, **options}
    resume = (directory / "state.json").exists()
    millrace.fit(model, options.pop("data"), epochs=6, log_every=4, callbacks=[Slow(pause_s)], run_dir=directory,
                 resume=resume, compile="eager", progress=False, seed=3, **options)  # fmt: skip


def disk(sync_s: float) -> None:
    """Makes syncing take this long instead of what the disk takes, which only a power cut would need."""
    os.fsync = lambda descriptor: time.sleep(sync_s)  # type: ignore[assignment]


def forked(victim: Callable[[], None]) -> int:
    """The number of a new process that runs `victim`."""
    pid = os.fork()
    if pid == 0:
        try:
            victim()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> bool:
    """Waits for a victim; whether it was killed. It must not have failed by itself."""
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a victim failed")
    return os.WIFSIGNALED(status)


def over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_a_save(pid: int, checkpoints: Path, tries: random.Random) -> None:
    """Until a victim is writing a checkpoint, and for some time of that."""
    deadline_s = time.monotonic() + 10
    chosen = tries.randrange(4)  # not always the first
    seen: set[str] = set()
    while time.monotonic() < deadline_s and len(seen) <= chosen and not over(pid):
        if checkpoints.exists():
            seen |= {entry.name for entry in os.scandir(checkpoints) if ".tmp-" in entry.name}
        time.sleep(0.001)
    time.sleep(tries.uniform(0, 0.1))


def last_checkpoint(directory: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    newest = max(RunDirectory.open(directory).checkpoints.glob("step-????????"))
    extra = json.loads((newest / "extra.json").read_text())
    return newest.name, load_file(newest / "variables.safetensors"), extra


def evaluations(directory: Path) -> list[Any]:
    records = RunDirectory.open(directory).read_metrics()
    kept = [{name: value for name, value in r.items() if name != "time_s"} for r in records if "validation/loss" in r]
    unique = {json.dumps(record) for record in kept}  # one that a kill came after may stand there twice, but equal
    return sorted(unique, key=lambda text: json.loads(text)["step"])


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not the same in two finished runs, to the last bit."""
    (name, variables, extra), (other_name, others, other_extra) = last_checkpoint(whole), last_checkpoint(killed)
    found = [] if name == other_name else [f"{name} and {other_name}"]
    found += list(variables.keys() ^ others.keys())
    found += [key for key in variables.keys() & others.keys() if not variables[key].equal(others[key])]
    found += [f"extra {key}" for key in extra if extra[key] != other_extra.get(key)]
    states = RunDirectory.open(whole).state, RunDirectory.open(killed).state
    found += [] if [s.status for s in states] == ["finished"] * 2 else [f"{states[1].status}"]
    if evaluations(whole) != evaluations(killed):
        found.append("evaluations")
    return found


def run(scenario: str, directory: Path, kills: int, tries: random.Random, while_saving: bool) -> dict[str, Any]:
    pause_s = 0.01
    ended(forked(lambda: train(scenario, directory / "whole", 0.0)))
    deaths = 0
    for _ in range(kills):
        pid = forked(lambda: train(scenario, directory / "killed", pause_s))
        if while_saving:
            wait_for_a_save(pid, directory / "killed" / "checkpoints", tries)
        else:
            time.sleep(tries.uniform(0, 1.0))
        os.kill(pid, signal.SIGKILL)
        deaths += ended(pid)
    ended(forked(lambda: train(scenario, directory / "killed", 0.0)))
    return {"deaths": deaths, "differences": differences(directory / "whole", directory / "killed")}


def main(directory: Path, kills: int, seed: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    tries = random.Random(seed)
    train("arrays", directory / "warm", 0.0)  # imports what training imports, for all who are forked from here
    while_saving = names[0] == "--save"
    disk(0.02 if while_saving else 0.0)  # long enough to be met by a kill
    scenarios = [name for name in names if name != "--save"]
    print(json.dumps({name: run(name, directory / name, kills, tries, while_saving) for name in scenarios}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
