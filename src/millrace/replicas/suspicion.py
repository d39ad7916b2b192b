"""When a member is to be taken for lost although its connection stands: pure, and told the time.

Frozen: no beat for BEAT_LATE_S. Stuck: it beats, but what is expected of it does not come forward. Who waits for other
members has longer for that: first one who does not wait is suspected, then the wait itself ends (`GROUP_WAITS`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BEAT_S = 0.1  # between two beats of a member
BEAT_LATE_S = 1.0
# Times as long as a member may show no progress:
GROUP_WAITS = 1.5  # a member waits for the others of its group, before it says that this is broken
WAITING_MAY = 2.0  # it may show no progress itself while it waits


@dataclass(frozen=True)
class Watched:
    """What is known of a member. Times are of one clock, in seconds.

    beat_s: its last beat. progress: what the beat counted. doing: what it said it was doing. waits: for other members.
    moved_s: when it last sent or took something, counted on, or was first expected to. within_s: how long it may take
    for that, None for as long as it likes.
    """

    beat_s: float
    progress: int = 0
    doing: str = ""
    moved_s: float = 0.0
    within_s: float | None = None
    waits: bool = False

    def beaten(self, now_s: float, progress: int, doing: str, waits: bool = False) -> Watched:
        """After a beat."""
        moved_s = now_s if progress != self.progress else self.moved_s
        return replace(self, beat_s=now_s, progress=progress, doing=doing, waits=waits, moved_s=moved_s)

    def said(self, now_s: float) -> Watched:
        """After a message or a part of one, which is progress."""
        return replace(self, moved_s=now_s)

    def expected(self, now_s: float, within_s: float | None) -> Watched:
        """From now on it must move within so long, again and again."""
        return replace(self, moved_s=now_s, within_s=within_s)

    def excused(self, now_s: float) -> Watched:
        """After a time in which nobody listened: all clocks start anew."""
        return replace(self, beat_s=now_s, moved_s=now_s)

    def suspicion(self, now_s: float, beat_late_s: float = BEAT_LATE_S) -> str | None:
        """Why it must be taken for lost, or None."""
        if now_s - self.beat_s > beat_late_s:
            return f"stopped (no sign of life for {beat_late_s:.1f} s)"
        if self.within_s is None:
            return None
        within_s = self.within_s * (WAITING_MAY if self.waits else 1.0)
        if now_s - self.moved_s > within_s:
            doing = f" while doing {self.doing}" if self.doing else ""
            return f"stuck: no progress for {within_s:.3g} s{doing} (patience_s allows more)"
        return None
