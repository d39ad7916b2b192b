"""A program that saves checkpoints and meets with misfortune; `test_checkpoint.py` runs it.

    saver_to_kill.py random DIRECTORY ROUNDS SEED   is killed at random moments, again and again
    saver_to_kill.py points DIRECTORY               is killed before each single thing it asks of the file system
    saver_to_kill.py full DIRECTORY LIMIT_BYTES     meets a full disk (0) or a file size limit
    saver_to_kill.py leave DIRECTORY                ends right after a save, and after one that fails

It forks its victims, which costs milliseconds where a new Python with torch costs seconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from millrace.errors import CheckpointError
from millrace.runtime.checkpoint import Checkpoint, Checkpoints
from millrace.runtime.commit import Digest


def state(step: int, version: int, size: int = 100_000) -> dict[str, Tensor]:
    """The one right state after a step, in the version of its first or a later save."""
    generator = torch.Generator().manual_seed(1000 * step + version)
    weight = torch.randn(size, generator=generator)
    return {"w": weight, "half": weight[:99].bfloat16(), "step": torch.tensor(step), "empty": torch.empty(0, 3)}


def save(checkpoints: Checkpoints, step: int, version: int) -> None:
    checkpoints.save(step, state(step, version), {"version": version}, metric=float(step % 7))


def age(found: Checkpoint) -> tuple[int, int]:
    """Step and version of a checkpoint, once it is known to be exactly what was saved for them."""
    wanted = state(found.step, found.extra["version"])
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), f"{name} of step {found.step} is not what was saved"
    return found.step, found.extra["version"]


def fork(victim: Callable[[int], None]) -> tuple[int, int]:
    """Runs `victim(pipe)` in a forked process; returns its number and the end of the pipe to read."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reads)
        try:
            victim(writes)
        except BaseException as error:
            print(f"the victim failed by itself: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writes)
    return pid, reads


def acknowledged(reads: int) -> list[tuple[int, int]]:
    with os.fdopen(reads) as pipe:
        pairs = [line.split() for line in pipe]
    return [(int(step), int(version)) for step, version in pairs]


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if "." in entry.name]


def killed_at_random(directory: Path, rounds: int, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    directory.mkdir()
    newest, torn, kills = (0, 0), 0, 0
    for _ in range(rounds):

        def victim(writes: int, start: int = newest[0] + 1) -> None:
            with Checkpoints(directory, keep_last=2) as checkpoints:
                for step in range(start, start + 10_000):
                    for version in range(1 + step % 2):
                        save(checkpoints, step, version)
                        if step % 3:
                            checkpoints.wait()
                            os.write(writes, f"{step} {version}\n".encode())

        pid, reads = fork(victim)
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        torn += bool(leftovers(directory))
        checkpoints = Checkpoints(directory, keep_last=2)
        assert not leftovers(directory), leftovers(directory)
        promised = max([newest, *acknowledged(reads)])
        if checkpoints.steps():
            found = age(checkpoints.load())
            assert found >= promised, f"{promised} was promised, found {found}"
            newest = found
            for step in checkpoints.steps():
                age(checkpoints.load(step))
        else:
            assert promised == (0, 0), f"{promised} was promised, nothing is there"
    return {"kills": kills, "torn": torn, "newest": newest[0]}


def killed_at_every_point(directory: Path) -> dict[str, int]:
    """A step is replaced, another is added, one is pruned: dies before the first request of all this, the second, …"""
    seen: set[tuple[int, int]] = set()
    for point in range(1, 500):
        here = directory / str(point)
        with Checkpoints(here, keep_last=2, keep_best=0) as checkpoints:
            save(checkpoints, 1, 0)
            save(checkpoints, 2, 0)

        def victim(writes: int, here: Path = here, point: int = point) -> None:
            requests = 0

            def count(event: str, arguments: object) -> None:
                nonlocal requests
                if event.startswith(("open", "os.")) and threading.current_thread().name.startswith("save step"):
                    requests += 1
                    if requests == point:
                        os.kill(os.getpid(), signal.SIGKILL)

            checkpoints = Checkpoints(here, keep_last=2, keep_best=0)
            sys.addaudithook(count)
            for step, version in ((2, 1), (3, 0)):
                save(checkpoints, step, version)
                checkpoints.wait()
                os.write(writes, f"{step} {version}\n".encode())

        pid, reads = fork(victim)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        promised = max([(2, 0), *acknowledged(reads)])
        checkpoints = Checkpoints(here, keep_last=2, keep_best=0)
        found = age(checkpoints.load())
        assert found >= promised, f"point {point}: {promised} was promised, found {found}"
        assert not leftovers(here), f"point {point}: {leftovers(here)}"
        steps = checkpoints.steps()
        assert len(steps) >= 2, f"point {point}: only {steps} are left"
        for step in steps:
            age(checkpoints.load(step))
        seen.add(found)
        if code != -signal.SIGKILL:
            assert code == 0
            return {"points": point - 1, "outcomes": len(seen)}
    raise AssertionError("the saver never came to its end")


def full(directory: Path, limit_bytes: int) -> dict[str, str]:
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state(1, 0), {"version": 0}, wait=True)
    checkpoints.save(2, state(2, 0, size=1_000_000), {"version": 0})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        message = str(error)
    else:
        raise AssertionError("a full disk went unnoticed")
    assert not leftovers(directory)
    assert age(checkpoints.load()) == (1, 0)
    checkpoints.save(3, state(3, 0), {"version": 0}, wait=True)
    assert age(checkpoints.load()) == (3, 0)
    return {"message": message}


def leave(directory: Path) -> None:
    def refuse(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        raise OSError(5, "Input/output error")

    warnings.simplefilter("default")
    Checkpoints(directory).save(5, state(5, 0), {"version": 0})
    Checkpoints(directory / "bad", write=refuse).save(1, state(1, 0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a kill may not even cause a warning
    # Newer Pythons warn of every fork beside threads; the victims use none of their parent's.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    mode, place, *numbers = sys.argv[1:]
    modes: dict[str, Callable[..., object]] = {
        "random": killed_at_random,
        "points": killed_at_every_point,
        "full": full,
        "leave": leave,
    }
    print(json.dumps(modes[mode](Path(place), *map(int, numbers))))
