"""Results on disk: JSON lines, one file per benchmark, each line with its date and machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def stamped(figure: dict[str, Any]) -> dict[str, Any]:
    """The figure with its date, machine and source revision."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**figure, "date": now, "machine": machine(figure["device"]), "commit": _commit()}


def machine(device: str) -> str:
    """The processor, and the GPU if one was used, in words."""
    name = f"{_processor()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        name = f"{gpu[0] if gpu else 'GPU'}; {name}"
    return name


def save(benchmark: str, figures: Iterable[dict[str, Any]], directory: Path = RESULTS) -> Path:
    """Write the figures; older ones of other names stay, those of the same name go."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{benchmark}.jsonl"
    kept = {figure["name"]: figure for figure in read(path)}
    kept |= {figure["name"]: figure for figure in figures}
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(kept[name]) + "\n" for name in sorted(kept)))
    temporary.replace(path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The figures of one file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


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
