"""Where more machines stop paying."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def saturation(examples_per_s: Mapping[int, float], gain: float = 0.1) -> int | None:
    """The least number of workers from which twice as many bring less than `gain` more; None if they always do.

    examples_per_s: by workers; only numbers whose double is there, too, are looked at.
    """
    for workers in sorted(examples_per_s):
        twice = examples_per_s.get(2 * workers)
        if twice is not None and twice < (1 + gain) * examples_per_s[workers]:
            return workers
    return None


def servers_needed(rate: Callable[[int], float], unbounded: float, share: float = 0.9, most: int = 4096) -> int | None:
    """The least number of servers with a rate of at least `share` of the unbounded one; None if `most` are too few.

    rate: by servers; it is asked about 2 log2(servers) times, and taken to rise with servers.
    """
    enough = 1
    while rate(enough) < share * unbounded:
        if enough >= most:
            return None
        enough = min(2 * enough, most)
    few = enough // 2
    while few + 1 < enough:
        middle = (few + enough) // 2
        if rate(middle) < share * unbounded:
            few = middle
        else:
            enough = middle
    return enough
