"""Time from the call of `fit` to the end of its first step, in a fresh process with cold caches.

Against the first step of eager PyTorch and of torch.compile (one sample each of what has to compile). Importing and
building the model is in nobody's time.

python bench/first_step.py [--models mlp,cnn] [--rounds 5] [--jax VENV] [--tf VENV] [--json] [--save]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from catalogue import COMPILE, EAGER, MILLRACE_FIT, PeerSpec, jax_jit, select, tf_function
from driver import Race, Samples, Settings, exported, say, task_of
from figures import losses_agree, spread, table, times, versions_of
from options import finish, parser, peers_of, precisions_of, publish, settings_of, workloads_of
from worker import PeerError, Worker, worker_environment
from workloads import Workload

TARGET_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser(__doc__, rounds=5, precisions=("float32",)).parse_args(arguments)
    peers = [EAGER, MILLRACE_FIT, COMPILE]
    peers += [make(path) for make, path in ((jax_jit, chosen.jax), (tf_function, chosen.tf)) if path]
    figures = publish(measure(chosen, select(peers, peers_of(chosen))))
    return finish("first_step", figures, readable(figures), chosen)


def measure(chosen: Any, peers: Sequence[PeerSpec]) -> Iterator[dict[str, Any]]:
    """The figure of every chosen model, as they come."""
    settings = settings_of(chosen)
    for workload in workloads_of(chosen):
        for precision in precisions_of(chosen):
            result = first_steps(workload, precision, peers, settings)
            if MILLRACE_FIT.name in result.samples:
                yield figure(result)


def first_steps(workload: Workload, precision: str, peers: Sequence[PeerSpec], settings: Settings) -> Race:
    """Start every peer `rounds` times in turn (those that compile once), and keep the time of its first step."""
    result = Race(workload, precision, settings, {}, {})
    with exported(workload) as weights:
        task = {**task_of(workload, precision, weights, settings), "check_steps": 1}
        for number in range(settings.rounds):
            for spec in peers:
                if spec.name in result.failed or (number and spec not in (EAGER, MILLRACE_FIT)):
                    continue
                try:
                    ready = _one(spec, task, settings)
                except PeerError as error:
                    result.failed[spec.name] = str(error)
                    say(str(error))
                    continue
                result.samples.setdefault(spec.name, Samples(spec, ready)).step_s.append(ready["first_step_s"])
        say(f"{workload.name} {precision}: done")
    return result


def _one(spec: PeerSpec, task: dict[str, Any], settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="millrace-bench-cache-") as cache:
        cold = {"MILLRACE_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        with Worker(spec, task, worker_environment(settings.threads) | cold) as worker:
            ready: dict[str, Any] = worker.answer(settings.start_limit_s)["ready"]
            return ready


def figure(result: Race) -> dict[str, Any]:
    """Seconds to the first step, and how many times as long every peer takes."""
    ours = result.samples[MILLRACE_FIT.name]
    ours_s = statistics.median(ours.step_s)
    others = {name: sample for name, sample in result.samples.items() if sample is not ours}
    ratios = {name: statistics.median(sample.step_s) / ours_s for name, sample in others.items()}
    return {
        "name": f"first_step/{result.workload.name}/{result.precision}",
        "ratio": ratios.get("compile", ratios.get("eager")),
        "ratios": ratios,
        "seconds": ours_s,
        "target_s": TARGET_S,
        "peers": {name: {**spread(s.step_s), "samples": len(s.step_s)} for name, s in result.samples.items()},
        "losses_agree": losses_agree(result)[MILLRACE_FIT.name],
        "failed": result.failed,
        "workload": result.workload.title,
        "precision": result.precision,
        "rounds": result.settings.rounds,
        "threads": result.settings.threads,
        "device": result.settings.device,
        "versions": versions_of(result.samples.values()),
    }


def readable(figures: Sequence[dict[str, Any]]) -> str:
    """The figures as a table for people."""
    columns = [name for name in ("eager", "compile", "jax", "tf") if any(name in f["ratios"] for f in figures)]
    rows = [
        [
            f["name"].removeprefix("first_step/"),
            f"{f['seconds']:.2f} s",
            *(times(f["ratios"].get(name)) for name in columns),
            "agree" if f["losses_agree"] else "DISAGREE",
        ]
        for f in figures
    ]
    return table(rows, ["first step", "millrace.fit", *columns, "losses"]) + (
        f"\nSeconds from the call of fit to the end of the first step (wanted: {TARGET_S:g} s or less); then how many "
        "times\nas long each peer's first step takes."
    )


if __name__ == "__main__":
    sys.exit(main())
