"""The step times and memory on a CUDA device: the standard models, and GPT-2 small in bf16.

GPT-2 small runs in bf16 only, against torch.compile. Says "no GPU" and ends with status 3 where there is none.

python bench/gpu.py [--models gpt2,mlp] [--rounds 7] [--jax VENV] [--json] [--save]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from catalogue import COMPILE_FUSED, EAGER_FUSED, MILLRACE, OURS, select, standard
from driver import race
from figures import memory_figure, step_time_figures
from memory import readable as readable_memory
from options import finish, parser, peers_of, precisions_of, publish, settings_of, workloads_of
from step_time import readable as readable_time
from workloads import STANDARD

NO_GPU = 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__, models=("gpt2", *STANDARD))
    options.add_argument("--turn", type=float, default=0.5, help="seconds of a peer's turn (default %(default)s)")
    options.set_defaults(threads=4)
    chosen = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false, so there is nothing to measure")
        return NO_GPU
    figures = publish(measure(chosen))
    by_kind = {kind: [f for f in figures if f["name"].startswith(f"gpu_{kind}/")] for kind in ("step_time", "memory")}
    text = f"{readable_time(by_kind['step_time'])}\n\n{readable_memory(by_kind['memory'])}"
    return finish("gpu", figures, text, chosen)


def measure(chosen: Any) -> Iterator[dict[str, Any]]:
    """Time and memory of every chosen model and precision, as they come. One race gives both."""
    settings = settings_of(chosen, turn_s=chosen.turn, device="cuda", starts=4)
    for workload in workloads_of(chosen):
        peers = standard(workload, jax=chosen.jax, cuda=True)
        precisions = precisions_of(chosen)
        if workload.name == "gpt2":
            # Three copies fill the device; the others would only be slower.
            peers, precisions = [COMPILE_FUSED, MILLRACE, EAGER_FUSED], ["bfloat16"]
        for precision in precisions:
            result = race(workload, precision, select(peers, peers_of(chosen)), settings)
            figures = step_time_figures(result)
            figures += [memory_figure(result, s) for s in result.samples.values() if s.spec.kind == OURS]
            yield from ({**figure, "name": f"gpu_{figure['name']}"} for figure in figures)


if __name__ == "__main__":
    sys.exit(main())
