"""The two small files of a checkpoint: the manifest, which vouches for the others, and the extra, which is JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from millrace.errors import CheckpointError, DamagedCheckpointError
from millrace.runtime.commit import Digest

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    step: int
    metric: float | None
    files: dict[str, Digest]


def encode_manifest(manifest: Manifest, *, format_version: int = FORMAT_VERSION) -> bytes:
    """The one spelling of a manifest; it carries its own checksum."""
    body: dict[str, Any] = {
        "format_version": format_version,
        "step": manifest.step,
        "metric": manifest.metric,
        "files": {name: {"sha256": d.sha256, "bytes": d.size_bytes} for name, d in sorted(manifest.files.items())},
    }
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body, indent=1).encode() + b"\n"


def decode_manifest(path: Path, content: bytes) -> Manifest:
    """Reads a manifest, down to the last blank: any byte that was not written so means that it was altered.

    Raises: DamagedCheckpointError; CheckpointError for a later format than this program knows.
    """
    damaged = DamagedCheckpointError(f"{path} is truncated or altered: it does not match its own checksum.")
    try:
        body = json.loads(content)
        claimed = body.pop("sha256")
        intact = claimed == hashlib.sha256(json.dumps(body).encode()).hexdigest()
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise damaged from None
    if intact and body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body.get('format_version')}; this program reads version {FORMAT_VERSION}. "
            "Use the version of millrace that wrote it."
        )
    if not intact or json.dumps(body | {"sha256": claimed}, indent=1).encode() + b"\n" != content:
        raise damaged
    files = {name: Digest(entry["sha256"], entry["bytes"]) for name, entry in body["files"].items()}
    return Manifest(body["step"], body["metric"], files)


def encode_extra(extra: Mapping[str, Json]) -> bytes:
    """JSON that reads back as it was, but for tuples; Python's spelling of NaN and infinity is allowed."""
    _check_json(extra, "extra")
    return json.dumps(extra, indent=1).encode() + b"\n"


def _check_json(value: object, where: str) -> None:
    # json.dumps would turn a key 3 into "3" without a word, and stop at a tensor without saying where.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON keys are strings. Use {str(key)!r}.")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int | float)):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, which JSON does not hold. Put tensors among the checkpoint's "
            "tensors, and turn the rest into numbers, strings, lists and dicts."
        )
