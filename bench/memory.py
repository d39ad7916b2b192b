"""Peak memory while stepping, above what a process holds after its imports, against eager PyTorch and torch.compile.

The peak counts from the end of the first steps on, when everything has been compiled: what a long run needs. On a CUDA
device it is the peak of allocated device memory.

python bench/memory.py [--models mlp,cnn] [--json] [--save]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from catalogue import (
    COMPILE,
    EAGER,
    EAGER_FUSED,
    MILLRACE,
    MILLRACE_EAGER,
    MILLRACE_TIERED,
    OURS,
    jax_jit,
    select,
    tf_function,
)
from driver import race
from figures import memory_figure, table
from options import finish, parser, peers_of, precisions_of, publish, settings_of, workloads_of

COLUMNS = ("eager", "eager_fused", "compile", "jax", "tf")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser(__doc__, rounds=2, precisions=("float32",)).parse_args(arguments)
    figures = publish(measure(chosen))
    return finish("memory", figures, readable(figures), chosen)


def measure(chosen: Any, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """The figures of every chosen model, as they come."""
    settings = settings_of(chosen, device=device, turn_s=0.1)
    peers = [EAGER, EAGER_FUSED, COMPILE, MILLRACE_TIERED, MILLRACE, MILLRACE_EAGER]
    peers += [make(path) for make, path in ((jax_jit, chosen.jax), (tf_function, chosen.tf)) if path]
    for workload in workloads_of(chosen):
        for precision in precisions_of(chosen):
            result = race(workload, precision, select(peers, peers_of(chosen)), settings)
            yield from (memory_figure(result, sample) for sample in result.samples.values() if sample.spec.kind == OURS)


def readable(figures: Sequence[dict[str, Any]]) -> str:
    """The figures as a table for people."""
    columns = [name for name in COLUMNS if any(name in f["ratios"] for f in figures)]
    rows = []
    for figure in figures:
        ours = figure["peers"][figure["name"].rpartition("/")[2]]
        rows.append(
            [
                figure["name"].removeprefix("memory/"),
                f"{ours['steps_bytes'] / 2**20:.0f}",
                f"{ours['start_bytes'] / 2**20:.0f}",
                *(f"{figure['ratios'][name]:.2f}" if name in figure["ratios"] else "-" for name in columns),
            ]
        )
    header = ["memory", "ours, stepping MiB", "starting MiB", *(f"/ {name}" for name in columns)]
    return table(rows, header) + "\nPeaks above the process after its imports; then ours over each peer's (stepping)."


if __name__ == "__main__":
    sys.exit(main())
