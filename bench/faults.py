"""python -m bench.faults: what every kind of fault costs a run: until it is noticed, and until the next step.

Replicas train on the digits, over processes of this machine (or a local Ray: --cluster local), by collectives, over
parameter servers in step, and over parameter servers asynchronously. At a moment drawn by seed one of the processes is
killed (SIGKILL), frozen (SIGSTOP), fails in the user's code, or runs out of memory; the next fault comes when all are
there again. Prints one JSON line for each kind, with medians and maxima: seconds until the driver noticed, from the
fault to the next step that was finished after that, and the longest time without one; how many steps, slices or batches
were computed again; and goodput: the steps taken from the fault until all was well again (at least --every seconds),
against those of the same time without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.faulty_run import FaultyRun, begin, told
from bench.fragile import DIRECTORY, MEMORY, RAISE
from millrace.replicas.settings import Async, Sync

Who = Callable[[FaultyRun], Sequence[str]]


def _signal(what: signal.Signals, who: Who) -> Callable[[FaultyRun, random.Random], None]:
    return lambda run, choices: run.signal(choices.choice(sorted(who(run))), what)


def _order(what: str) -> Callable[[FaultyRun, random.Random], None]:
    return lambda run, choices: Path(os.environ[DIRECTORY], what).touch()


KILL, FREEZE = signal.SIGKILL, signal.SIGSTOP
SESSIONS: dict[str, Sync | Async] = {
    "collective": Sync(),
    "servers": Sync(parameter_servers=1),
    "async": Async(parameter_servers=1),
}
KINDS: dict[str, dict[str, Callable[[FaultyRun, random.Random], None]]] = {
    "collective": {
        "worker killed": _signal(KILL, FaultyRun.workers),
        "worker frozen": _signal(FREEZE, FaultyRun.workers),
        "spare killed": _signal(KILL, FaultyRun.spares),
        "user code raises": _order(RAISE),
        "out of memory": _order(MEMORY),
    },
    "servers": {
        "shard killed": _signal(KILL, FaultyRun.shards),
        "shard frozen": _signal(FREEZE, FaultyRun.shards),
        "copy killed": _signal(KILL, FaultyRun.copies),
        "worker killed": _signal(KILL, FaultyRun.workers),
    },
    "async": {
        "shard killed": _signal(KILL, FaultyRun.shards),
        "worker killed": _signal(KILL, FaultyRun.workers),
        "worker frozen": _signal(FREEZE, FaultyRun.workers),
        "user code raises": _order(RAISE),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Exit status 0."""
    options = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    options.add_argument("--sessions", default=",".join(SESSIONS), help="some of: " + ", ".join(SESSIONS))
    options.add_argument("--kinds", default="", help="words that a kind must contain one of, such as killed,frozen")
    options.add_argument("--faults", type=int, default=20, help="of each kind")
    options.add_argument("--every", type=float, default=1.3, help="seconds from a fault to the next, at least")
    options.add_argument("--replicas", type=int, default=3)
    options.add_argument("--spares", type=int, default=1)
    options.add_argument("--cluster", default=None, help="local: members are actors of a local Ray")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    torch.manual_seed(given.seed)
    began_s = time.monotonic()
    for name in given.sessions.split(","):
        kinds = [kind for kind in KINDS[name] if any(word in kind for word in given.kinds.split(","))]
        with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
            measure(name, kinds, Path(directory), given)
    print(f"all in {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return 0


def measure(name: str, kinds: Sequence[str], directory: Path, given: argparse.Namespace) -> None:
    """All faults of one session, kind after kind."""
    began_s = time.monotonic()
    run = begin(SESSIONS[name], directory, given)
    choices = random.Random(given.seed)
    try:
        start_s = time.monotonic() - began_s
        for kind in kinds:
            healthy, first, again = run.rate_for(2.0), len(run.faults), run.again()
            for number in range(given.faults):
                run.cycle(lambda run, kind=kind: KINDS[name][kind](run, choices), choices, healthy, given.every)
                print(f"  {name}, {kind}: {number + 1} of {given.faults}", file=sys.stderr, flush=True)
            line = {"name": f"faults, {name}, {kind}", "start_s": round(start_s, 2), "step_ms": round(1e3 / healthy, 2)}
            print(json.dumps({**line, **told(run, first), "computed_again": run.again() - again}), flush=True)
    finally:
        run.steps_of.close()  # which finishes what is in flight
        run.session.close()


if __name__ == "__main__":
    sys.exit(main())
