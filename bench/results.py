"""Results on disk: one JSON file per machine, with each figure's date, command and source revision."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def stamped(figure: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The figure with when, how and of which source it was measured."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**figure, "date": now, "command": " ".join(command), "commit": _commit()}


def machine(device: str) -> dict[str, Any]:
    """The processor, and the GPU if one is used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": _processor(), "cores": cores, "system": platform.platform()}
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        found["gpu"] = gpu[0] if gpu else "GPU"
    return {"name": _name(found), **found}


def save(figures: Iterable[dict[str, Any]], device: str, directory: Path = RESULTS) -> Path:
    """Write the figures into this machine's file; older ones of other names stay, those of the same name go."""
    here = machine(device)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (re.sub(r"[^a-z0-9]+", "-", here["name"].lower()).strip("-") + ".json")
    old = json.loads(path.read_text())["figures"] if path.exists() else []
    kept = {figure["name"]: figure for figure in [*old, *figures]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": here, "figures": list(kept.values())}, indent=1) + "\n")
    temporary.replace(path)
    return path


def read(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """Every machine's results: "machine" and "figures"."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


def _name(found: dict[str, Any]) -> str:
    host = f"{found['processor']}, {found['cores']} cores"
    return f"{found['gpu']} with {host}" if "gpu" in found else host


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
