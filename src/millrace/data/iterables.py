"""Sources that can only be read from front to back: seeking reads and throws away, or uses the source's own state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from millrace.data.batches import Batch, EpochBatches, Json
from millrace.data.nest import as_batch
from millrace.data.randomness import derived_seed, follow_epoch, own_generators_kept, seeded_global_random
from millrace.errors import DataError


class IterableBatches(EpochBatches):
    """Anything that gives its batches anew each time it is iterated; each time is an epoch.

    Every batch is read with the global random state seeded from (seed, epoch, number), the iterable's own generators
    (attributes) are seeded at each epoch's start, and its `set_epoch` is called where it has one.
    """

    def __init__(
        self,
        fresh: Callable[[], Iterator[Any]],
        name: str,
        seed: int,
        *,
        owners: Iterable[object] = (),
        evaluate: Callable[[], Iterator[Any]] | None = None,
        batches_per_epoch: int | None = None,
    ) -> None:
        """
        Args:
            fresh: starts one reading from the front.
            owners: objects that may hold random generators, or wait for set_epoch.
            evaluate: starts one reading for evaluation, where that is another one.
        """
        super().__init__(name, {"seed": seed})
        self._fresh = fresh
        self._evaluate = evaluate or fresh
        self._seed = seed
        self._owners = list(owners)
        self._batches_per_epoch = batches_per_epoch

    @property
    def batches_per_epoch(self) -> int | None:
        return self._batches_per_epoch

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        return self._read(self._fresh, epoch, first)

    def one_pass(self) -> Iterator[Batch]:
        with own_generators_kept(self._owners):
            yield from self._read(self._evaluate, 0, 0)

    def _read(self, fresh: Callable[[], Iterator[Any]], epoch: int, first: int, skipped: int = 0) -> Iterator[Batch]:
        """From batch `first` on, of which the first `skipped` need no reading because `fresh` starts after them."""
        with seeded_global_random(derived_seed("start", self._seed, epoch)):
            follow_epoch(self._owners, epoch, self._seed)
            batches = fresh()
        number = skipped
        while True:
            with seeded_global_random(derived_seed("read", self._seed, epoch, number)):
                try:
                    batch = next(batches)
                except StopIteration:
                    break
            number += 1
            if number > first:
                yield as_batch(batch, self.name)
        if number < first:
            raise DataError(
                f"{self.name} ended after {number} batches on the way to the saved position, which is after batch "
                f"{first} of epoch {epoch}: it is not the data of the run that saved it. Resume with the same data."
            )


class OnceBatches(IterableBatches):
    """A one-shot iterator: a single epoch, forward only."""

    def __init__(self, iterator: Iterator[Any], name: str, seed: int) -> None:
        super().__init__(self._take, name, seed)
        self._iterator = iterator
        self._taken = 0  # batches that have left the iterator

    @property
    def exhausted(self) -> bool:
        return self.epoch > 0

    def advance(self) -> Batch | None:
        if self.exhausted:
            raise DataError(self._ended_early(None, self.epoch + 1))
        return super().advance()

    def _take(self) -> Iterator[Any]:
        for batch in self._iterator:
            self._taken += 1
            yield batch

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        if self._taken > first:
            raise DataError(
                f"{self.name} cannot go back to batch {first}: {self._taken} batches have left it and it can be read "
                "only once. Give data that can be iterated again, or a function that makes a fresh iterator."
            )
        return self._read(self._fresh, epoch, first, self._taken)

    def one_pass(self) -> Iterator[Batch]:
        if self._taken:
            raise DataError(
                f"{self.name} can be read only once, and {self._taken} batches have left it, so there is no full pass "
                "over it. Give data that can be iterated again, or a function that makes a fresh iterator."
            )
        yield from self._read(self._fresh, 0, 0)


class StatefulBatches(IterableBatches):
    """An iterable that can save and load its own place (`state_dict`, `load_state_dict`).

    Its state goes into the position where JSON can carry it unchanged, and seeking loads it; else seeking reads and
    throws away. What the state leaves out (a shuffle buffer, say) cannot be continued exactly.
    """

    def __init__(self, stateful: Any, name: str, seed: int, owners: Iterable[object] = ()) -> None:
        super().__init__(lambda: iter(stateful), name, seed, owners=owners)
        self._stateful = stateful
        # An object that is its own iterator does not start over by itself.
        self._initial = stateful.state_dict() if hasattr(stateful, "__next__") else None
        self._sought: dict[str, Json] | None = None  # a state to load when the epoch is opened

    def position(self) -> dict[str, Json]:
        position = super().position()
        state = self._sought if self._reader is None else _as_json(self._stateful.state_dict())
        if state is not None and position["batch"] != 0:
            position["state"] = state
        return position

    def seek(self, position: Mapping[str, Json]) -> None:
        super().seek(position)
        state = position.get("state")
        self._sought = dict(state) if isinstance(state, dict) else None

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        state, self._sought = self._sought, None
        if state is None:
            return self._read_from_front(epoch, first)

        def continued() -> Iterator[Any]:
            self._stateful.load_state_dict(state)
            return iter(self._stateful)

        return self._read(continued, epoch, first, skipped=first)

    def _read_from_front(self, epoch: int, first: int) -> Iterator[Batch]:
        empty = True
        for batch in self._read(self._restarted, epoch, first):
            empty = False
            yield batch
        if empty and first == 0:
            # Resumed at the very end of an epoch, an object may not have noticed that the end was reached, and take
            # this reading for the (empty) rest of that epoch.
            yield from self._read(self._restarted, epoch, first)

    def close(self) -> None:
        if self._reader is not None:
            self._sought = _as_json(self._stateful.state_dict()) if self._batch else None
        super().close()

    def _restarted(self) -> Iterator[Any]:
        if self._initial is not None:
            self._stateful.load_state_dict(self._initial)
        return iter(self._stateful)

    def one_pass(self) -> Iterator[Batch]:
        # The place is inside the object itself: closing remembers it, and reading on goes back there.
        self.close()
        yield from self._read(self._restarted, 0, 0)


def _as_json(state: object) -> dict[str, Json] | None:
    """The state if it comes back from JSON equal to itself (int keys and tuples do not), else None."""
    try:
        copied = json.loads(json.dumps(state))
        unchanged = isinstance(copied, dict) and bool(copied == state)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a comparison of tensors
        return None
    return cast("dict[str, Json]", copied) if unchanged else None
