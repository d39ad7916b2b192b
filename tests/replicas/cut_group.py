"""What a member imports (`--imports`) so that nothing passes between the ranks of its first group after a while."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.replicas.shared_group import SharedGroup

ROUNDS = 3
_finish = SharedGroup._finish


def _cut(group: SharedGroup, bucket_indices: Sequence[int]) -> None:
    group.rounds = getattr(group, "rounds", 0) + 1  # type: ignore[attr-defined]
    if group.generation <= 1 and group.rounds > ROUNDS:  # type: ignore[attr-defined]
        group._patience.until(lambda: False, lambda: "a link that is cut")
    _finish(group, bucket_indices)


SharedGroup._finish = _cut  # type: ignore[method-assign]
