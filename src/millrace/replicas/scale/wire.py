"""Transfers that share the network cards of servers, max-min fairly, in one direction.

Every worker's values are spread evenly over all servers, and it exchanges them with all at once. So all servers are
always in the same state: their cards are one card of their summed rate. A worker has one transfer at a time in a
direction. The max-min fair share is then the same for all transfers under way: the rate of a worker's card, or an equal
part of the servers'. All are served alike, so "bytes sent for each so far" is a clock on which a transfer ends at a
time that is known when it begins (the virtual time of fair queueing), however many come and go in between.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush


class Wire:
    """What is under way; `next_s` is when the next transfer ends, infinity when there is none."""

    def __init__(self, all_bytes_per_s: float, each_bytes_per_s: float) -> None:
        self.next_s = math.inf
        self._all, self._each = all_bytes_per_s, each_bytes_per_s
        self._now_s = 0.0
        self._rate = 0.0  # bytes/s of every transfer
        self._served = 0.0  # bytes that each transfer would have got since the wire was last empty
        self._ends: list[tuple[float, int]] = []  # (value of `_served` at the end, who)
        self._carried = 0.0

    def __len__(self) -> int:
        return len(self._ends)

    def start(self, now_s: float, size_bytes: float, who: int) -> None:
        """Begin a transfer; `who` has none yet on this wire."""
        self._advance(now_s)
        heappush(self._ends, (self._served + size_bytes, who))
        self._share()

    def finish(self) -> int:
        """End the transfer that is due at `next_s`, and say whose it was."""
        self._advance(self.next_s)
        self._served, who = heappop(self._ends)
        if not self._ends:
            self._served = 0.0
        self._share()
        return who

    def carried_bytes(self, now_s: float) -> float:
        """What went over it until now."""
        self._advance(now_s)
        return self._carried

    def _advance(self, now_s: float) -> None:
        gained = (now_s - self._now_s) * self._rate
        self._served += gained
        self._carried += gained * len(self._ends)
        self._now_s = now_s

    def _share(self) -> None:
        if not self._ends:
            self._rate, self.next_s = 0.0, math.inf
            return
        self._rate = min(self._each, self._all / len(self._ends))
        self.next_s = self._now_s + max(0.0, self._ends[0][0] - self._served) / self._rate
