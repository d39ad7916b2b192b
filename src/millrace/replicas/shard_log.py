"""Entries and snapshots of a shard's log as JSON, for the way to its copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from millrace.replicas.shard_events import Ack, Async, Configured, Entry, Known, Policy, Pushed, Snapshot, Sync

_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (Sync, Async, Pushed)}


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """How replicas agree."""
    return {"kind": type(policy).__name__, **asdict(policy)}


def policy_from_json(found: Mapping[str, Any]) -> Policy:
    """The reverse of `policy_to_json`."""
    policy: Policy = _KINDS[found["kind"]](**{name: value for name, value in found.items() if name != "kind"})
    return policy


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """One entry of the log."""
    if isinstance(entry, Pushed):
        return {"kind": "Pushed", **vars(entry)}
    return {"kind": "Configured", "policy": policy_to_json(entry.policy), "workers": list(entry.workers)}


def entry_from_json(found: Mapping[str, Any]) -> Entry:
    """The reverse of `entry_to_json`."""
    if found["kind"] == "Configured":
        return Configured(policy_from_json(found["policy"]), tuple(found["workers"]))
    return Pushed(**{name: value for name, value in found.items() if name != "kind"})


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    """All that the log has decided."""
    return {
        **{name: getattr(snapshot, name) for name in ("version", "index", "version_index")},
        "policy": policy_to_json(snapshot.policy),
        "workers": list(snapshot.workers),
        "known": {worker: [known.index, vars(known.ack)] for worker, known in snapshot.known.items()},
        "clocks": dict(snapshot.clocks),
        "staged": [entry_to_json(push) for push in snapshot.staged.values()],
    }


def snapshot_from_json(found: Mapping[str, Any]) -> Snapshot:
    """The reverse of `snapshot_to_json`."""
    staged = [entry_from_json(entry) for entry in found["staged"]]
    return Snapshot(
        policy_from_json(found["policy"]),
        tuple(found["workers"]),
        found["version"],
        found["index"],
        found["version_index"],
        {worker: Known(index, Ack(**ack)) for worker, (index, ack) in found["known"].items()},
        found["clocks"],
        {push.slice: push for push in staged if isinstance(push, Pushed)},
    )
