"""Time to the end of the first step, each time in a fresh process.

For Millrace from the call of `fit`: with an empty cache of compiled steps (it starts eagerly), and with the cache that
an earlier process left. For the others from their first step's beginning, with empty caches. Importing the framework
and building the model is in nobody's time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.catalogue import COMPILE, EAGER, FIT, FIT_FILL, FIT_WARM, PeerSpec
from bench.race import Race, Samples, Settings, exported, say, task_of
from bench.worker import PeerError, Worker, worker_environment
from bench.workloads import Workload

_OFTEN = (EAGER, FIT, FIT_WARM)  # the others take seconds of compiling: once is enough to see that


def first_steps(workload: Workload, precision: str, peers: Sequence[PeerSpec], settings: Settings) -> Race:
    """Start every peer in turn, `rounds` times (those that compile, once), and keep the time of its first step.

    What `COMPILE` and `FIT_FILL` compile stays in `settings.cache`, which spares the races' peers the same work.
    """
    result = Race(workload, precision, settings)
    with exported(workload) as weights, tempfile.TemporaryDirectory(prefix="millrace-bench-") as fresh:
        task = {**task_of(workload, precision, weights, settings), "check_steps": 1}
        for number in range(settings.rounds):
            for spec in peers:
                if spec.name in result.failed or (number and spec not in _OFTEN):
                    continue
                cache = (
                    settings.cache if spec in (COMPILE, FIT_FILL, FIT_WARM) else Path(fresh) / f"{spec.name}-{number}"
                )
                try:
                    ready = _one(spec, task, worker_environment(settings.threads, cache), settings.start_limit_s)
                except PeerError as error:
                    result.failed[spec.name] = str(error)
                    say(str(error))
                    continue
                result.samples.setdefault(spec.name, Samples(spec, ready)).seconds.append(ready["first_step_s"])
        say(f"{workload.name} {precision}: first steps done")
    return result


def _one(spec: PeerSpec, task: Mapping[str, Any], environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    with Worker(spec, task, environment) as worker:
        ready: dict[str, Any] = worker.answer(limit_s)["ready"]
        return ready
