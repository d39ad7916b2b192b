"""Who can be measured: each peer's script, interpreter and options, by the name it has in figures and on the command
line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.workloads import Workload

OURS = "millrace"
GROUPS = ("eager", "compile", "jax", "tf")  # in a table's order


@dataclass(frozen=True)
class PeerSpec:
    """One way to run a step.

    group: what it is a variant of (`OURS` or one of `GROUPS`); a table shows the best variant of a group.
    module: the file under `peers`. options: what that file is told. python: the interpreter it runs under.
    """

    name: str
    group: str
    title: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def command(self) -> list[str]:
        return [self.python, "-m", f"bench.peers.{self.module}"]

    @property
    def steps_per_call(self) -> int:
        return int(self.options.get("steps_per_call", 1))


def _torch(name: str, group: str, title: str, module: str, **options: Any) -> PeerSpec:
    return PeerSpec(name, group, title, module, options)


EAGER = _torch("eager", "eager", "eager PyTorch", "eager")
EAGER_FOREACH = _torch("eager_foreach", "eager", "eager PyTorch, foreach optimizer", "eager", optimizer="foreach")
EAGER_FUSED = _torch("eager_fused", "eager", "eager PyTorch, fused optimizer", "eager", optimizer="fused")
COMPILE = _torch("compile", "compile", "torch.compile", "torch_compile")
COMPILE_FUSED = _torch("compile_fused", "compile", "torch.compile, fused optimizer", "torch_compile", optimizer="fused")
COMPILE_WHOLE = _torch(
    "compile_whole", "compile", "torch.compile, optimizer compiled too", "torch_compile", optimizer="compiled"
)
COMPILE_GRAPHS = _torch(
    "compile_graphs",
    "compile",
    "torch.compile with CUDA graphs, fused optimizer",
    "torch_compile",
    optimizer="fused",
    mode="reduce-overhead",
)
# What `fit` and a session do by default: eager first, compiled when ready. Measured once it is compiled.
MILLRACE = _torch("millrace", OURS, "millrace", "millrace_step", compile="tiered")
FIT = _torch("fit", OURS, "millrace.fit, empty cache", "millrace_fit")
FIT_WARM = _torch("fit_warm", OURS, "millrace.fit, second start", "millrace_fit")
FIT_FILL = _torch("fit_fill", OURS, "millrace.fit, compiling first", "millrace_fit", compile="inductor")


def millrace_in_one_call(steps: int) -> PeerSpec:
    """Millrace with several steps in one compiled call."""
    title = f"millrace, {steps} steps per call"
    return _torch(f"millrace_x{steps}", OURS, title, "millrace_step", compile="inductor", steps_per_call=steps)


def jax_jit(environment: str, steps: int = 1) -> PeerSpec:
    """`jax.jit` in the virtual environment (or under the interpreter) that is named."""
    suffix = f"_x{steps}" if steps > 1 else ""
    title = "jax.jit" + (f", {steps} steps per call" if steps > 1 else "")
    return PeerSpec(f"jax{suffix}", "jax", title, "jax_jit", {"steps_per_call": steps}, _interpreter(environment))


def tf_functions(environment: str, steps: int = 1) -> list[PeerSpec]:
    """`tf.function` without and with XLA, in the virtual environment (or under the interpreter) that is named."""
    python = _interpreter(environment)
    suffix = f"_x{steps}" if steps > 1 else ""
    return [
        PeerSpec(f"{name}{suffix}", "tf", title, "tf_function", {"jit_compile": jit, "steps_per_call": steps}, python)
        for name, title, jit in (("tf", "tf.function", False), ("tf_xla", "tf.function with XLA", True))
    ]


def step_peers(workload: Workload, *, jax: str | None, tf: str | None, device: str) -> list[PeerSpec]:
    """The peers that a workload's step is measured with. Every one that can is there with several steps per call."""
    cuda = device.startswith("cuda")
    if workload.large:  # three copies of it fill the device; the other variants would only be slower
        return [COMPILE_FUSED, MILLRACE, EAGER_FUSED]
    chosen = [EAGER, EAGER_FUSED, COMPILE_FUSED, COMPILE_WHOLE, MILLRACE]
    chosen.append(COMPILE_GRAPHS if cuda else EAGER_FOREACH)  # foreach is what eager does by default on a GPU
    counts = (1, workload.steps_per_call) if workload.steps_per_call > 1 else (1,)
    for steps in counts:
        chosen += [millrace_in_one_call(steps)] if steps > 1 else []
        chosen += [jax_jit(jax, steps)] if jax else []
        chosen += tf_functions(tf, steps) if tf else []
    return chosen


def first_step_peers(*, jax: str | None, tf: str | None) -> list[PeerSpec]:
    """The peers whose first step is measured.

    `COMPILE` starts with an empty cache, which `FIT_FILL` then fills for `FIT_WARM`.
    """
    chosen = [EAGER, FIT, COMPILE, FIT_FILL, FIT_WARM]
    chosen += [jax_jit(jax)] if jax else []
    return chosen + (tf_functions(tf)[:1] if tf else [])


def select(specs: Sequence[PeerSpec], names: Sequence[str]) -> list[PeerSpec]:
    """Those of `specs` that are named; all of them without names. Exits when none is."""
    chosen = [spec for spec in specs if not names or spec.name in names]
    if not chosen:
        raise SystemExit(f"no peer is called {', '.join(names)}; here there are {', '.join(s.name for s in specs)}")
    return chosen


def _interpreter(environment: str) -> str:
    path = Path(environment)
    python = path if path.is_file() else path / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{environment}: expected a virtual environment or a Python interpreter")
    return str(python.absolute())
