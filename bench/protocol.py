"""The worker's side of a measurement: a process that holds one peer and answers in JSON lines.

A worker is started with its task as JSON in the first argument. It builds its peer, takes the checked steps (which
compile what there is to compile) and says {"ready": …}. To {"calibrate": S} it answers {"steps": N}, how many steps
last S seconds; to {"run": N}, {"seconds", "loss"} after N more steps; to {"end": true}, its memory, and then ends.
Nothing here needs a framework, because the peers live in environments of their own.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Peer:
    """What a framework has to offer to be measured.

    run: take that many steps and return the last loss, without waiting for it. read: wait for a loss. prepare: what
    belongs to the first step's time but happens once (tracing). steps_per_call: `run` takes multiples of it.
    device_peak_bytes: peak memory on the device since `reset_device_peak`. notes: more to say in "ready".
    """

    run: Callable[[int], Any]
    read: Callable[[Any], float]
    versions: dict[str, str]
    prepare: Callable[[], None] = lambda: None
    steps_per_call: int = 1
    device_peak_bytes: Callable[[], int] = lambda: 0
    reset_device_peak: Callable[[], None] = lambda: None
    notes: dict[str, Any] = field(default_factory=dict)


def serve(build: Callable[[dict[str, Any]], Peer]) -> None:
    """Be a worker: build the peer of the task in argv, then answer until the end.

    `build` makes model, weights, batch and optimizer; its time is not measured, `prepare`'s is.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    task = json.loads(sys.argv[1])
    limit_processors(task["threads"])
    baseline_bytes = resident_bytes()
    reset_peak()
    peer = build(task)
    ready = first_steps(peer, task["check_steps"])
    start_peak_bytes = peak_bytes()
    gc.collect()
    reset_peak()
    peer.reset_device_peak()
    answers.write(json.dumps({"ready": ready}) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        if "run" in question:
            answer = run(peer, question["run"])
        elif "calibrate" in question:
            answer = {"steps": calibrate(peer, question["calibrate"])}
        else:
            answer = {
                "baseline_bytes": baseline_bytes,
                "start_peak_bytes": start_peak_bytes,
                "steps_peak_bytes": peak_bytes(),
                "device_peak_bytes": peer.device_peak_bytes(),
            }
        answers.write(json.dumps(answer) + "\n")
        if "end" in question:
            break


def first_steps(peer: Peer, check_steps: int) -> dict[str, Any]:
    """Take the checked steps; say how long the first one took, and the loss after the last."""
    start_s = time.perf_counter()
    peer.prepare()
    taken, first_step_s, loss = 0, 0.0, math.nan
    while taken < check_steps:
        loss = peer.read(peer.run(peer.steps_per_call))
        taken += peer.steps_per_call
        first_step_s = first_step_s or time.perf_counter() - start_s
    return {
        "first_step_s": first_step_s,
        "steps": taken,
        "loss": loss,
        "versions": {**peer.versions, "python": sys.version.split()[0]},
        **peer.notes,
    }


def run(peer: Peer, steps: int) -> dict[str, Any]:
    """Take `steps` steps and wait for the last loss."""
    start_s = time.perf_counter()
    loss = peer.read(peer.run(steps))
    return {"seconds": time.perf_counter() - start_s, "loss": loss}


def calibrate(peer: Peer, seconds: float) -> int:
    """How many steps last about `seconds`: a multiple of `steps_per_call`, found by doubling."""
    steps = peer.steps_per_call
    while (taken_s := run(peer, steps)["seconds"]) < seconds / 2:
        steps *= 2
    calls = steps / peer.steps_per_call * seconds / taken_s
    return max(1, round(calls)) * peer.steps_per_call


def limit_processors(threads: int) -> None:
    """Keep this process, and every thread pool it makes from now on, to that many processors."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most memory resident since `reset_peak` (since the start, on systems where that does nothing)."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Count the peak from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _end_with_parent(parent: int) -> None:
    """End this process, and the compilers that it started, when its parent is gone: nobody would read its answers."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _status_bytes(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
