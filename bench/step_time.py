"""Step time of the standard models against eager PyTorch, torch.compile and, where given, jax.jit and tf.function.

python bench/step_time.py [--models mlp,cnn] [--threads 2] [--rounds 7] [--jax VENV] [--tf VENV] [--json] [--save]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from catalogue import OURS, select, standard
from driver import race
from figures import step_time_figures, table, times
from options import finish, parser, peers_of, precisions_of, publish, settings_of, workloads_of

COLUMNS = ("eager", "eager_fused", "compile", "compile_fused", "compile_graphs", "jax", "tf")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--turn", type=float, default=0.3, help="seconds of a peer's turn (default %(default)s)")
    chosen = options.parse_args(arguments)
    figures = publish(measure(chosen))
    return finish("step_time", figures, readable(figures), chosen)


def measure(chosen: Any, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """The figures of every chosen model and precision, as they come."""
    settings = settings_of(chosen, turn_s=chosen.turn, device=device)
    for workload in workloads_of(chosen):
        for precision in precisions_of(chosen):
            peers = standard(workload, jax=chosen.jax, tf=chosen.tf, cuda=device != "cpu")
            result = race(workload, precision, select(peers, peers_of(chosen)), settings)
            yield from step_time_figures(result)
            for spec in peers:
                if spec.kind == OURS and spec.name in result.failed:
                    print(f"{workload.name} {precision}: {result.failed[spec.name]}", file=sys.stderr)


def readable(figures: Sequence[dict[str, Any]]) -> str:
    """The figures as a table for people."""
    present = [name for name in COLUMNS if any(name in figure["ratios"] for figure in figures)]
    rows = [
        [
            figure["name"].removeprefix("step_time/"),
            times(figure["ratio"]),
            *(times(figure["ratios"].get(name)) for name in present),
            f"{1e3 * figure['peers'][figure['name'].rpartition('/')[2]]['median_s']:.2f}",
            "agree" if figure["losses_agree"] else "DISAGREE",
        ]
        for figure in figures
    ]
    note = "Times as fast as each peer (median of the rounds' ratios; above 1: millrace is faster). Losses: against\n"
    note += "eager PyTorch's from the same weights after the same number of steps."
    return table(rows, ["figure", "best torch", *present, "ours ms", "losses"]) + "\n" + note


if __name__ == "__main__":
    sys.exit(main())
