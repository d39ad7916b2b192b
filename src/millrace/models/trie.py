"""A trie: which token may come next, so that a search writes nothing but sequences of a given set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millrace.errors import DataError


class Trie:
    """Token sequences by their prefixes; `next_tokens` is what `beam_search` takes as `allowed`."""

    def __init__(self, sequences: Iterable[Sequence[int]], end: int) -> None:
        """Args: sequences: without the end. end: the token that ends one.

        Raises:
            DataError: there are no sequences, or the end is inside of one.
        """
        self._next: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            if end in sequence:
                raise DataError(f"A sequence of a trie must not hold its end {end}, but got {list(sequence)}.")
            for length, token in enumerate([*sequence, end]):
                self._next.setdefault(tuple(sequence[:length]), set()).add(token)
        if not self._next:
            raise DataError("A trie needs at least one sequence, but got none.")

    def next_tokens(self, prefix: tuple[int, ...]) -> Sequence[int]:
        """What may come after a prefix, in ascending order; nothing after one that is in no sequence."""
        return sorted(self._next.get(prefix, ()))
