"""What general compressors need for a text, to measure language models against: gzip -9 and xz -9."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Mapping

from millrace.errors import DataError

COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda content: gzip.compress(content, 9, mtime=0),
    "xz -9": lambda content: lzma.compress(content, preset=9),
}


def bits_per_byte(compress: Callable[[bytes], bytes], content: bytes, after: bytes = b"") -> float:
    """Bits that a compressor writes for each byte of `content`.

    Args:
        compress: one of COMPRESSORS.
        after: what it has read before, as a model has read what it was trained on: counted is by how much the
            compressed form of both together is longer than that of `after` alone. (gzip remembers its last 32 KiB
            only, xz -9 its last 64 MiB.)

    Raises:
        DataError: `content` is empty.
    """
    if not content:
        raise DataError("The text is empty: bits per byte need at least one byte.")
    before = len(compress(after)) if after else 0
    return 8 * (len(compress(after + content)) - before) / len(content)
