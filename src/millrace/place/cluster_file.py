"""A cluster as a TOML file. docs/clusters.md describes the format; units are in the names of the keys."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from millrace.errors import PlacementError, did_you_mean
from millrace.files import replace_bytes
from millrace.place.cluster import CLASSES, MEMORY, SPECIAL, Cluster, Device, Link
from millrace.place.presets import preset_device

_PRECISIONS = ("float64", "float32", "bfloat16", "float16")
RATE_KEYS = [f"{c}.{p}" if p else c for c in (*CLASSES, SPECIAL) for p in ("", *_PRECISIONS)]
_DEVICE_KEYS = ["name", "count", "like", "kind", "memory_bytes", "dispatch_s", "threads", "rates", "busy_rates"]
_LINK_KEYS = ["source", "target", "latency_s", "bytes_per_s", "shared", "sender_copies"]
_NAME = re.compile(r"/[\w-]+:\d+/[\w-]+:\d+")
_RANGE = re.compile(r"(.*)\[(\d+)-(\d+)\](.*)")
_MOST_DEVICES = 4096

Refuse = Callable[[str], PlacementError]


def read_cluster(path: Path) -> Cluster:
    """The cluster in a TOML file. Raises: PlacementError that names the file, the entry and what is wrong with it."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(
            f"cannot read the cluster file {path}: {error}. It must be a text file in TOML."
        ) from error
    return parse_cluster(content, str(path))


def parse_cluster(content: str, path: str) -> Cluster:
    """The cluster in the content of a TOML file. `path`: for messages. Raises: PlacementError as `read_cluster`."""

    def refuse(message: str) -> PlacementError:
        return PlacementError(f"{path}: {message}")

    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise refuse(f"this is not TOML: {error}. See docs/clusters.md for the format.") from error
    _known(values, ["device", "link"], "the file", refuse)
    devices: list[Device] = []
    for number, entry in enumerate(_entries(values, "device", refuse), 1):
        devices.extend(_devices(entry, f"device {number}", refuse))
    if not devices:
        raise refuse("expected at least one [[device]], got none. Add one.")
    names = [d.name for d in devices]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise refuse(f"two devices are called {twice[0]!r}: every name must be there once. Rename one.")
    links = tuple(
        _link(entry, f"link {number}", names, refuse)
        for number, entry in enumerate(_entries(values, "link", refuse), 1)
    )
    cluster = Cluster(tuple(devices), links)
    for source in names:
        for target in names:
            if source != target and not any(link.joins(source, target) for link in links):
                raise refuse(f'no [[link]] leads from {source} to {target}. Add one; source and target may be "*".')
    return cluster


def to_toml(cluster: Cluster) -> str:
    """The text that `parse_cluster` reads as the same cluster."""
    parts = ["# A cluster of millrace; docs/clusters.md describes the format.\n"]
    for device in cluster.devices:
        parts.append(
            f"[[device]]\nname = {_text(device.name)}\nkind = {_text(device.kind)}\n"
            f"memory_bytes = {device.memory_bytes}\ndispatch_s = {float(device.dispatch_s)!r}\n"
            f"threads = {device.threads}\n\n[device.rates]  # flop/s; byte/s for memory\n"
            + "".join(f"{_text(key)} = {float(rate)!r}\n" for key, rate in device.rates.items())
        )
        if device.busy_rates:
            parts.append(
                "[device.busy_rates]  # while all devices of the host work\n"
                + "".join(f"{_text(key)} = {float(rate)!r}\n" for key, rate in device.busy_rates.items())
            )
    for link in cluster.links:
        parts.append(
            f"[[link]]\nsource = {_text(link.source)}\ntarget = {_text(link.target)}\n"
            f"latency_s = {float(link.latency_s)!r}\nbytes_per_s = {float(link.bytes_per_s)!r}\n"
            f"shared = {str(link.shared).lower()}\nsender_copies = {str(link.sender_copies).lower()}\n"
        )
    return "\n".join(parts)


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write a cluster to a TOML file, whole or not at all. Raises: PlacementError when it cannot be written."""
    try:
        replace_bytes(path, to_toml(cluster).encode())
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror or error}. Choose another place.") from error


def _entries(values: Mapping[str, Any], key: str, refuse: Refuse) -> list[dict[str, Any]]:
    found = values.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise refuse(f"{key}: expected entries that begin with [[{key}]], got {found!r}.")
    return found


def _devices(entry: Mapping[str, Any], where: str, refuse: Refuse) -> list[Device]:
    _known(entry, _DEVICE_KEYS, where, refuse)
    name = _string(entry, "name", where, refuse)
    where = f"{where} ({name})"
    base = None
    if "like" in entry:
        try:
            base = preset_device(_string(entry, "like", where, refuse), name)
        except PlacementError as error:
            raise refuse(f"{where}: like: {error}") from error
    kind = base.kind if base and "kind" not in entry else _string(entry, "kind", where, refuse)
    if kind not in ("cpu", "cuda"):
        raise refuse(f'{where}: kind: expected "cpu" or "cuda", got {kind!r}. {did_you_mean(kind, ["cpu", "cuda"])}')
    memory = base.memory_bytes if base and "memory_bytes" not in entry else _whole(entry, "memory_bytes", where, refuse)
    rates = {**(base.rates if base else {}), **_rates(entry, "rates", where, refuse)}
    busy_rates = _rates(entry, "busy_rates", where, refuse)
    for operators in CLASSES:
        if operators not in rates:
            unit = "byte/s" if operators == MEMORY else "flop/s"
            raise refuse(f"{where}: rates.{operators} is missing: expected a rate in {unit}. State it, or `like`.")
    default = base.dispatch_s if base else 0.0
    dispatch_s = _number(entry, "dispatch_s", where, refuse, zero=True) if "dispatch_s" in entry else default
    threads = _whole(entry, "threads", where, refuse) if "threads" in entry else 1
    return [Device(n, kind, memory, rates, dispatch_s, threads, busy_rates) for n in _names(entry, name, where, refuse)]


def _names(entry: Mapping[str, Any], name: str, where: str, refuse: Refuse) -> list[str]:
    """The names for which one entry stands: `/host:0/gpu:[0-3]`, or a first name and `count`."""
    if "count" in entry:
        name_count = _whole(entry, "count", where, refuse)
        stem, _, first = name.rpartition(":")
        if not _NAME.fullmatch(name):
            raise refuse(f'{where}: with count, name is the first one, such as "/host:0/gpu:0"; got {name!r}.')
        span, pattern = (int(first), int(first) + name_count - 1), stem + ":{}"
    elif match := _RANGE.fullmatch(name):
        span, pattern = (int(match[2]), int(match[3])), f"{match[1]}{{}}{match[4]}"
    else:
        span, pattern = (0, 0), name
    if not 0 <= span[1] - span[0] < _MOST_DEVICES:
        raise refuse(f"{where}: expected a rising range of up to {_MOST_DEVICES} devices, got {span[0]} to {span[1]}.")
    if "{" in name or not _NAME.fullmatch(pattern.replace("{}", "0")):
        raise refuse(f'{where}: expected a name such as "/host:0/gpu:1" or "/host:0/gpu:[0-3]", got {name!r}.')
    return [pattern.replace("{}", str(number)) for number in range(span[0], span[1] + 1)]


def _rates(entry: Mapping[str, Any], name: str, where: str, refuse: Refuse) -> dict[str, float]:
    table = entry.get(name, {})
    if not isinstance(table, dict):
        raise refuse(f"{where}: {name}: expected a table of rates by class of operators, got {table!r}.")
    _known(table, RATE_KEYS, f"{where}: {name}", refuse)
    return {key: _number(table, key, f"{where}: {name}", refuse) for key in table}


def _link(entry: Mapping[str, Any], where: str, names: list[str], refuse: Refuse) -> Link:
    _known(entry, _LINK_KEYS, where, refuse)
    source, target = (_string(entry, key, where, refuse) for key in ("source", "target"))
    for key, pattern in (("source", source), ("target", target)):
        probe = Link(pattern, "*", 0.0, 1.0)
        if not any(probe.joins(name, name) for name in names):
            raise refuse(
                f"{where}: {key}: no device is called, or matches, {pattern!r}. {did_you_mean(pattern, names)}"
            )
    shared, sender_copies = (_choice(entry, key, where, refuse) for key in ("shared", "sender_copies"))
    if shared and sender_copies:
        raise refuse(f"{where}: shared and sender_copies: of a sender that copies there is no wire to share. Drop one.")
    latency_s = _number(entry, "latency_s", where, refuse, zero=True)
    bytes_per_s = _number(entry, "bytes_per_s", where, refuse)
    return Link(source, target, latency_s, bytes_per_s, shared, sender_copies)


def _known(entry: Mapping[str, Any], keys: list[str], where: str, refuse: Refuse) -> None:
    for key in entry:
        if key not in keys:
            raise refuse(f"{where}: unknown key {key!r}. {did_you_mean(key, keys)}")


def _required(entry: Mapping[str, Any], key: str, where: str, expected: str, refuse: Refuse) -> Any:
    if key not in entry:
        raise refuse(f"{where}: {key} is missing: expected {expected}. Add it.")
    return entry[key]


def _string(entry: Mapping[str, Any], key: str, where: str, refuse: Refuse) -> str:
    value = _required(entry, key, where, "text", refuse)
    if not isinstance(value, str):
        raise refuse(f"{where}: {key}: expected text in quotes, got {value!r}.")
    return value


def _whole(entry: Mapping[str, Any], key: str, where: str, refuse: Refuse) -> int:
    value = _required(entry, key, where, "a whole number above 0", refuse)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise refuse(f"{where}: {key}: expected a whole number above 0, got {value!r}.")
    return value


def _choice(entry: Mapping[str, Any], key: str, where: str, refuse: Refuse) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise refuse(f"{where}: {key}: expected true or false, got {value!r}.")
    return value


def _number(entry: Mapping[str, Any], key: str, where: str, refuse: Refuse, *, zero: bool = False) -> float:
    expected = "a number of at least 0" if zero else "a number above 0"
    value = _required(entry, key, where, expected, refuse)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise refuse(f"{where}: {key}: expected {expected}, got {value!r}.")
    return float(value)


def _text(value: str) -> str:
    return json.dumps(value)
