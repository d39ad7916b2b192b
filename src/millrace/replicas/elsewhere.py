"""Where a replica's programs run, if not on the CPU of its own process."""

from __future__ import annotations

from millrace.compile.tiered import Say
from millrace.replicas import gpus
from millrace.replicas.divided import DividedPrograms
from millrace.replicas.gpu_programs import GpuPrograms
from millrace.replicas.line import Line
from millrace.replicas.protocol import Fields

Elsewhere = DividedPrograms | GpuPrograms


def programs_elsewhere(role: Fields, line: Line, *, compile: str, say: Say) -> Elsewhere | None:
    """What runs the programs of a replica whose variables are in host memory; None: its own process does.

    Args: role: what the driver said: `devices`, several; `gpu`, one.
    """
    if role["devices"]:
        return DividedPrograms(role["devices"], line, compile=compile, say=say)
    if role["gpu"] is not None:
        return GpuPrograms(gpus.use_gpu(line.name, role["gpu"]), compile=compile, say=say)
    return None
