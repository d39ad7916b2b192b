"""What a run ran on: versions, machine, devices, source revision, command line. Kept with the run, for whoever asks."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import torch

from millrace.version import __version__

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def environment() -> dict[str, Json]:
    """Describe this process and its machine.

    Returns:
        JSON-able values: `python`, `torch`, `millrace` (versions), `platform`, `host`, `cpus` (of the machine) and
        `cpus_allowed` (to this process), `threads` (of torch), `devices` (names), `git_commit` (of the working
        directory; ends in "-dirty" where tracked files differ from it; None outside a repository), `command` and
        `working_directory`.
    """
    return {
        "millrace": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "devices": list(device_names()),
        "git_commit": git_commit(Path.cwd()),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "working_directory": os.getcwd(),
    }


def device_names() -> list[str]:
    """The devices that this process can use: "cpu (arm64)", "cuda:0 (NVIDIA H200)", …

    The name of a CUDA device is left out where CUDA has not been used yet: asking would take memory on every device.
    """
    names = [f"cpu ({platform.processor() or platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        known = f" ({torch.cuda.get_device_name(index)})" if torch.cuda.is_initialized() else ""
        names.append(f"cuda:{index}{known}")
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def git_commit(directory: Path) -> str | None:
    """The commit checked out around `directory`, or None where there is none (or no git)."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
