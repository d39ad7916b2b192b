"""Reading ahead in a background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from millrace.data.batches import Batch, Batches, Json
from millrace.errors import DataError


@dataclass(frozen=True)
class _Place:
    """Where a source stands, copied: the source itself is further on."""

    epoch: int
    handed_out: int
    exhausted: bool
    position: dict[str, Json]

    @classmethod
    def of(cls, batches: Batches) -> _Place:
        return cls(batches.epoch, batches.handed_out, batches.exhausted, batches.position())


@dataclass(frozen=True)
class _Read:
    """One result of `advance` (or what it raised), and where the source stood after it."""

    batch: Batch | None
    place: _Place
    error: BaseException | None = None


class _Reader:
    """The thread and its bounded queue. It never refers to the PrefetchedBatches, so dropping those stops it."""

    def __init__(self, batches: Batches, depth: int) -> None:
        self._stopping = threading.Event()
        # One read is done and waits while `depth - 1` lie in the queue.
        self._reads: queue.Queue[_Read] = queue.Queue(maxsize=depth)
        self._thread = threading.Thread(
            target=_read_ahead, args=(batches, self._reads, self._stopping), name="millrace-prefetch", daemon=True
        )
        self._thread.start()

    def next(self) -> _Read:
        return self._reads.get()

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # a thread that waits to put must find room
                self._reads.get_nowait()
            self._thread.join(timeout=0.02)


def _read_ahead(batches: Batches, reads: queue.Queue[_Read], stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            read = _Read(batches.advance(), _Place.of(batches))
        except BaseException as error:
            reads.put(_Read(None, _Place.of(batches), error))
            return
        reads.put(read)
        if batches.exhausted:
            return


class PrefetchedBatches(Batches):
    """The batches of another source, read ahead by a thread; see `prefetched`."""

    draws_global_random = False

    def __init__(self, batches: Batches, depth: int) -> None:
        self.name = batches.name
        self._batches = batches
        self._depth = depth
        self._place = _Place.of(batches)
        self._reader: _Reader | None = None
        self._stop: weakref.finalize[..., PrefetchedBatches] | None = None

    @property
    def epoch(self) -> int:
        return self._place.epoch

    @property
    def handed_out(self) -> int:
        return self._place.handed_out

    @property
    def batches_per_epoch(self) -> int | None:
        return self._batches.batches_per_epoch

    @property
    def exhausted(self) -> bool:
        return self._place.exhausted

    def advance(self) -> Batch | None:
        if self.exhausted:
            return self._batches.advance()  # raises what the source has to say
        if self._reader is None:
            self._reader = _Reader(self._batches, self._depth)
            self._stop = weakref.finalize(self, self._reader.stop)
        read = self._reader.next()
        if read.error is not None:
            self._stop_reading()
            raise read.error
        self._place = read.place
        return read.batch

    def position(self) -> dict[str, Json]:
        return self._place.position

    def seek(self, position: Mapping[str, Json]) -> None:
        self._stop_reading()
        self._batches.seek(position)
        self._place = _Place.of(self._batches)

    def one_pass(self) -> Iterator[Batch]:
        # The thread must not read the source meanwhile.
        self.close()
        return self._batches.one_pass()

    def close(self) -> None:
        """Stop the thread; what it had read ahead is read again when reading goes on."""
        if self._reader is not None:
            self._stop_reading()
            if not self._place.exhausted:
                self._batches.seek(self._place.position)
        self._batches.close()

    def _stop_reading(self) -> None:
        if self._stop is not None:
            self._stop()
        self._reader, self._stop = None, None


def prefetched(batches: Batches, depth: int = 2) -> Batches:
    """The same batches, of which a background thread reads up to `depth` ahead while the caller computes.

    Positions refer to the batches handed out, never to those read ahead; an error while reading comes out at the
    batch that it concerns, with its traceback. `close()` ends the thread.

    Sources that draw from the global random state (most DataLoaders and data sets: `draws_global_random`) are
    returned as they are, with a warning: swapping that state in a thread would disturb the caller's own draws.

    Handing a batch over costs some tens of microseconds, so this pays where reading takes longer than that.

    Args:
        batches: the source; let nobody else read it any more.
        depth: batches to hold at most.

    Raises:
        DataError: depth is no positive number.
    """
    if depth < 1:
        raise DataError(f"depth must be a whole number of batches from 1 on, but {depth!r} was given.")
    if batches.draws_global_random:
        warnings.warn(
            f"{batches.name} may draw from the global random state, so it is read in the foreground. To read ahead, "
            "give a DataLoader with num_workers.",
            stacklevel=2,
        )
        return batches
    return PrefetchedBatches(batches, depth)
