"""The benchmark of narrowed tensors counts bytes as the transports do."""

from __future__ import annotations

import pytest
import torch
from bench.wire import figures

from millrace.place.wire import CODECS


def test_a_figure_for_each_codec_says_what_is_left_of_the_bytes() -> None:
    tensor = torch.rand(64, 64) + 1
    tensor[::2] = 0
    found = {figure["name"].split("/")[1]: figure for figure in figures("half zeros", tensor, rounds=1)}
    assert list(found) == list(CODECS)
    shares = [figure["share_of_bytes"] for figure in found.values()]
    assert shares == pytest.approx([1 / 2, 1 / 4 + 1 / 256, 1 / 2 + 1 / 32], abs=1e-3)
    for figure in found.values():
        assert min(figure["encode_us_per_mb"], figure["decode_us_per_mb"], figure["copy_us_per_mb"]) > 0
