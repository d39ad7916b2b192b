"""Who can be measured: each peer's script, interpreter and options, by the name it has in figures and on the command
line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workloads import Workload

OURS, TORCH, OTHER = "ours", "torch", "other"
_PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class PeerSpec:
    """One peer. kind: ours, torch (eager and torch.compile), or other (their own environments)."""

    name: str
    title: str
    kind: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def command(self) -> list[str]:
        return [self.python, str(_PEERS / self.script)]


EAGER = PeerSpec("eager", "eager", TORCH, "eager.py")
EAGER_FUSED = PeerSpec("eager_fused", "eager, fused optimizer", TORCH, "eager.py", {"fused": True})
COMPILE = PeerSpec("compile", "torch.compile", TORCH, "torch_compile.py")
COMPILE_FUSED = PeerSpec("compile_fused", "torch.compile, fused optimizer", TORCH, "torch_compile.py", {"fused": True})
COMPILE_GRAPHS = PeerSpec(
    "compile_graphs",
    "torch.compile with CUDA graphs, fused optimizer",
    TORCH,
    "torch_compile.py",
    {"fused": True, "mode": "reduce-overhead"},
)
MILLRACE = PeerSpec("millrace", "millrace", OURS, "millrace_step.py", {"compile": "inductor"})
MILLRACE_EAGER = PeerSpec("millrace_eager", "millrace, eager tier", OURS, "millrace_step.py", {"compile": "eager"})
MILLRACE_TIERED = PeerSpec("millrace_tiered", "millrace, tiered", OURS, "millrace_step.py", {"compile": "tiered"})
MILLRACE_FIT = PeerSpec("millrace_fit", "millrace.fit", OURS, "millrace_fit.py")


def millrace_in_one_call(steps: int) -> PeerSpec:
    """Millrace with several steps in one compiled call."""
    options = {"compile": "inductor", "steps_per_call": steps}
    return PeerSpec(f"millrace_x{steps}", f"millrace, {steps} steps per call", OURS, "millrace_step.py", options)


def jax_jit(environment: str) -> PeerSpec:
    """`jax.jit` in the virtual environment (or under the interpreter) that is named."""
    return PeerSpec("jax", "jax.jit", OTHER, "jax_jit.py", python=_interpreter(environment))


def tf_function(environment: str) -> PeerSpec:
    """`tf.function` in the virtual environment (or under the interpreter) that is named."""
    return PeerSpec("tf", "tf.function", OTHER, "tf_function.py", python=_interpreter(environment))


def standard(
    workload: Workload, *, jax: str | None = None, tf: str | None = None, cuda: bool = False
) -> list[PeerSpec]:
    """The peers that a workload's step time is measured with."""
    chosen = [EAGER, EAGER_FUSED, COMPILE, COMPILE_FUSED, MILLRACE, MILLRACE_EAGER]
    chosen += [millrace_in_one_call(steps) for steps in workload.steps_per_call]
    if cuda:
        chosen.append(COMPILE_GRAPHS)
    if jax:
        chosen.append(jax_jit(jax))
    if tf:
        chosen.append(tf_function(tf))
    return chosen


def select(specs: Sequence[PeerSpec], names: Sequence[str] | None) -> list[PeerSpec]:
    """Those of `specs` that are named; all of them without names."""
    if not names:
        return list(specs)
    known = [spec.name for spec in specs]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no peer is called {', '.join(unknown)}; here there are {', '.join(known)}")
    return [spec for spec in specs if spec.name in names]


def _interpreter(environment: str) -> str:
    path = Path(environment)
    python = path if path.is_file() else path / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{environment}: expected a virtual environment or a Python interpreter")
    return str(python)
