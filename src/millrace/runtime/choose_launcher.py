"""Which launcher starts the processes of a run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.runtime.launch import Launcher, ProcessLauncher
from millrace.runtime.ray_token import offer_token


def choose_launcher(
    cluster: str | None, module: str, arguments: Sequence[str], threads: int, directory: Path, **resources: Any
) -> Launcher:
    """A launcher for plain processes of this machine (None), or for those of a Ray cluster.

    Args:
        cluster: None, "local", "HOST:PORT" or "ray://HOST:PORT".
        module, arguments, threads, directory: see `ProcessLauncher`.
        resources: further arguments of `RayLauncher`, for a cluster.

    Raises: SettingError when Ray is not installed, or no cluster answers there.
    """
    if cluster is None:
        return ProcessLauncher(module, arguments, threads, directory)
    offer_token(cluster)
    # Imported by name, so that nothing of Ray is imported where no cluster is asked for.
    ray_launch = importlib.import_module("millrace.runtime.ray_launch")
    launcher: Launcher = ray_launch.RayLauncher(cluster, module, arguments, threads, directory, **resources)
    return launcher
