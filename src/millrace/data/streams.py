"""A long text as parallel streams: row r of every batch goes on where row r of the batch before ended."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.data.batches import Batch, EpochBatches
from millrace.data.randomness import derived_seed
from millrace.errors import DataError


class StreamBatches(EpochBatches):
    """See `stream_batches`."""

    draws_global_random = False

    def __init__(self, tokens: Tensor, streams: int, length: int, before: int, seed: int) -> None:
        if tokens.ndim != 1 or tokens.is_floating_point() or min(streams, length, before + 1) < 1:
            raise DataError(
                f"Streams are of one sequence of whole-number tokens, [n], with streams and length from 1 on, but got "
                f"{tokens.dtype} {list(tokens.shape)}, streams={streams}, length={length}, before={before}."
            )
        self._windows = (len(tokens) // streams - 1) // length
        if self._windows < 1:
            raise DataError(
                f"The text has {len(tokens)} tokens, but {streams} streams with windows of {length} need at least "
                f"{streams * (length + 1)}. Give more text, or ask for fewer streams or shorter windows."
            )
        identity = {"tokens": len(tokens), "streams": streams, "length": length, "before": before, "seed": seed}
        super().__init__("the streams", identity)
        self.tokens = tokens
        self.streams, self.length, self.before, self._seed = streams, length, before, seed

    @property
    def batches_per_epoch(self) -> int:
        return self._windows

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        offset = derived_seed("offset", self._seed, epoch) % len(self.tokens)
        yield from self._read(self.tokens.roll(-offset), first)

    def one_pass(self) -> Iterator[Batch]:
        """From the text's beginning on; what is left over at the end of each stream is not read."""
        yield from self._read(self.tokens, 0)

    def of_targets(self, values: Tensor) -> Tensor:
        """Of values for each token, [n], those of the targets of `one_pass`, in its order: [S, windows · L]."""
        per_stream = len(self.tokens) // self.streams
        return values[: per_stream * self.streams].view(self.streams, -1)[:, 1 : 1 + self._windows * self.length]

    def _read(self, tokens: Tensor, first: int) -> Iterator[Batch]:
        per_stream = len(tokens) // self.streams
        rows = tokens[: per_stream * self.streams].view(self.streams, per_stream)
        rows = torch.cat([rows.new_zeros(self.streams, self.before), rows], dim=1)
        for window in range(first, self._windows):
            begin = window * self.length
            read = rows[:, begin : begin + self.before + self.length + 1].to(torch.int64)
            yield {
                "inputs": read[:, :-1].contiguous(),
                "targets": read[:, self.before + 1 :].contiguous(),
                "stream": torch.arange(self.streams),
                "fresh": torch.full((self.streams,), window == 0),
            }


def stream_batches(tokens: Tensor, streams: int, length: int, before: int = 0, seed: int = 0) -> StreamBatches:
    """An endless stream of windows for models that carry state from one to the next.

    The text is cut into `streams` equal parts, which are read side by side, a window at a time. A batch is a dict:
    "inputs" [S, before + L], "targets" [S, L] (the token after each of the last L inputs), "stream" [S] (the row's
    number), "fresh" [S] bool (whether the row's stream begins here, so that nothing is to be carried). An epoch goes
    through the text once, from a place of its own on, and around its end.

    Args:
        tokens: [n], whole numbers.
        streams: S.
        length: L, tokens per window.
        before: how many tokens before each window come with it, for models that look at short sequences of tokens; at
            the beginning of a stream these are 0.
        seed: of the places where epochs begin.

    Raises:
        DataError: the text is too short for one window of each stream.
    """
    return StreamBatches(tokens, streams, length, before, seed)
