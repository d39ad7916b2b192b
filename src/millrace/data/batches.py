"""The one contract of this room: an endless source of batches whose place can be written down and found again.

A batch is a tensor, or a tuple, list or dict of batches. Training asks for batches, writes the position into its
checkpoints, and after any crash seeks back to it:

    batches = as_batches(data, batch_size=64, seed=0)
    for batch in batches.until(epochs=3):        # or until(batches=1000), or both: whichever comes first
        ...
        saved = batches.position()               # a small JSON value: after the batches handed out so far
    batches.seek(saved)                          # also in another process: continues bit for bit
    for batch in held_out.one_pass(): ...        # once over everything, in order, the last short batch too

Everything random in an epoch follows from (seed, epoch, number of the batch), so a source holds no random state that
a position would have to carry.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeAlias

from millrace.errors import DataError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
# A tensor or nested tuples, lists and dicts of tensors; the user's loss takes it apart, so Any is its honest type.
Batch: TypeAlias = Any

START: Mapping[str, Json] = {"epoch": 0, "batch": 0, "handed_out": 0}
"""Position zero of every source, for `seek`."""


class Batches(abc.ABC):
    """Batches, epoch after epoch, with a position that can be saved and sought."""

    name: str = "data"
    """What the source is called in messages."""

    draws_global_random: bool = True
    """Whether reading swaps the process's global random state for a moment (then no other thread may read)."""

    @property
    @abc.abstractmethod
    def epoch(self) -> int:
        """How many epochs are complete, which is also the number of the epoch being read."""

    @property
    @abc.abstractmethod
    def handed_out(self) -> int:
        """How many batches came out since position zero, over all epochs."""

    @property
    @abc.abstractmethod
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has, or None where only reading to its end can tell."""

    @property
    def exhausted(self) -> bool:
        """Whether no further batch can ever come (only data that can be read once ends)."""
        return False

    @abc.abstractmethod
    def advance(self) -> Batch | None:
        """The next batch, or None once at the end of each epoch (`epoch` has then gone up by one)."""

    @abc.abstractmethod
    def position(self) -> dict[str, Json]:
        """The place after the batches handed out so far, as a small JSON value for `seek`."""

    @abc.abstractmethod
    def seek(self, position: Mapping[str, Json]) -> None:
        """Go to a place that `position` gave, here or in another process: the same batches follow.

        Raises:
            DataError: the position is damaged, or was taken from other data or other settings.
        """

    @abc.abstractmethod
    def one_pass(self) -> Iterator[Batch]:
        """Everything once, for evaluation: in order, unshuffled, the short last batch included.

        The position stays where it is. Finish (or close) the pass before asking for training batches again.
        """

    def close(self) -> None:  # noqa: B027  (most sources hold nothing that needs closing)
        """Let go of threads, worker processes and open iterators; the position stays, and reading may go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch, from the present position on."""
        return self.until()

    def until(self, *, batches: int | None = None, epochs: int | None = None) -> Iterator[Batch]:
        """Batches from the present position on, until totals are reached.

        Both totals count from position zero, so a resumed run asks for the same totals as the run before it. A loop
        may be left and entered again: nothing is read ahead.

        Args:
            batches: stop when `handed_out` has reached this.
            epochs: stop when `epoch` has reached this.

        Raises:
            DataError: the data ended for good before that.
        """
        while (batches is None or self.handed_out < batches) and (epochs is None or self.epoch < epochs):
            if self.exhausted:
                raise DataError(self._ended_early(batches, epochs))
            batch = self.advance()
            if batch is not None:
                yield batch

    def _ended_early(self, batches: int | None, epochs: int | None) -> str:
        asked = [f"{batches} batches"] if batches is not None else []
        asked += [f"{epochs} epochs"] if epochs is not None else []
        return (
            f"{self.name} ended after {self.handed_out} batches, but "
            f"{' or '.join(asked) or 'an endless stream'} had been asked for, and it can be read only once. Give data "
            "that can be iterated again (a list, a DataLoader, a class with __iter__) or a function that makes a "
            "fresh iterator, or ask for less."
        )


class EpochBatches(Batches):
    """A source that can open any epoch at any batch; counting, seeking and ending epochs are done here."""

    def __init__(self, name: str, identity: Mapping[str, Json]) -> None:
        """`identity` names the settings under which a position means the same batches."""
        self.name = name
        self._identity = dict(identity)
        self._epoch = 0
        self._batch = 0  # of this epoch, handed out so far
        self._handed_out = 0
        self._reader: Iterator[Batch] | None = None
        self._length_seen: int | None = None  # of the last epoch read to its end

    @abc.abstractmethod
    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of one epoch, from number `first` on (zero-based; all are gone if `first` is its length)."""

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def handed_out(self) -> int:
        return self._handed_out

    def advance(self) -> Batch | None:
        if self._reader is None:
            self._reader = self._read_epoch(self._epoch, self._batch)
        try:
            batch = next(self._reader)
        except StopIteration:
            self._end_epoch()
            return None
        except BaseException:
            # A generator that raised is finished and would look like the end of the epoch: open it anew next time.
            self._reader = None
            raise
        self._batch += 1
        self._handed_out += 1
        return batch

    def _end_epoch(self) -> None:
        self._reader = None
        if self._batch == 0:
            again = f" in epoch {self._epoch}, after {self._length_seen} in the epoch before" if self._epoch else ""
            cure = (
                "It must give its batches anew each time it is iterated."
                if self._epoch
                else "Check that there are examples, and that drop_last does not drop the only, short batch."
            )
            raise DataError(f"{self.name} gave no batches{again}: at least one per epoch is needed. {cure}")
        self._length_seen = self._batch
        self._epoch += 1
        self._batch = 0

    def position(self) -> dict[str, Json]:
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "handed_out": self._handed_out,
            "of": dict(self._identity),
        }

    def seek(self, position: Mapping[str, Json]) -> None:
        epoch, batch, handed_out = (_count(self.name, position, key) for key in ("epoch", "batch", "handed_out"))
        self._check_identity(position.get("of"))
        if self.batches_per_epoch is not None and batch > self.batches_per_epoch:
            raise DataError(
                f"{self.name} has {self.batches_per_epoch} batches per epoch, but the position says that {batch} were "
                "handed out: it belongs to other data. Resume with the data of the run that saved it."
            )
        self.close()
        self._epoch, self._batch, self._handed_out = epoch, batch, handed_out

    def _check_identity(self, of: Json) -> None:
        if not isinstance(of, dict) or of == self._identity:
            return
        differing = [
            f"{key} was {of.get(key)!r} and is now {self._identity.get(key)!r}"
            for key in sorted(of.keys() | self._identity.keys())
            if of.get(key) != self._identity.get(key)
        ]
        raise DataError(
            f"The saved position does not fit {self.name}: {'; '.join(differing)}, so other batches would follow. "
            "Resume with the same data and settings, or start a new run."
        )

    def close(self) -> None:
        reader, self._reader = self._reader, None
        closing = getattr(reader, "close", None)
        if closing is not None:
            closing()


def _count(name: str, position: Mapping[str, Json], key: str) -> int:
    value = position.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(
            f"A position in {name} must hold {key!r} as a whole number from 0 on, but this one has {value!r}. "
            "Pass what position() returned, unchanged."
        )
    return value
