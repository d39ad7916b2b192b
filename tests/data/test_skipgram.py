"""Skip-gram batches: what is kept, what is noise, windows, and the same stream again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from millrace.data.skipgram import SkipGramBatches, kept_shares, noise_chances
from millrace.errors import DataError

COUNTS = [4000, 3000, 2000, 600, 300, 100]


def text(count: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    words = np.random.default_rng(0).choice(len(COUNTS), size=count, p=np.array(COUNTS) / sum(COUNTS))
    return words, np.arange(count) // 20


def batches(**changes: object) -> SkipGramBatches:
    settings = {"batch_size": 8, "length": 16, "window": 5, "noise": 32, "threshold": 0.0, "seed": 0} | changes
    return SkipGramBatches(*text(), COUNTS, **settings)  # type: ignore[arg-type]


def test_without_subsampling_an_epoch_is_the_text_once() -> None:
    source = batches(batch_size=5)
    found = torch.cat([batch["words"].flatten() for batch in source.until(epochs=1)])
    words, _ = text()
    assert len(found) == 10_000 // 16 * 16
    assert (found.bincount(minlength=6) - torch.from_numpy(words[: len(found)]).bincount(minlength=6)).abs().sum() == 0
    first = next(source.one_pass())
    assert first["words"].flatten().tolist() == words[: 5 * 16].tolist()
    assert first["sentences"].flatten().tolist() == (np.arange(5 * 16) // 20).tolist()


def test_frequent_words_are_left_out_as_the_paper_says() -> None:
    threshold = 0.01
    shares = np.array(COUNTS) / sum(COUNTS)
    expected = np.minimum(np.sqrt(threshold / shares) + threshold / shares, 1)
    assert kept_shares(COUNTS, threshold) == pytest.approx(expected)
    assert kept_shares(COUNTS, 0).tolist() == [1.0] * 6
    kept = torch.cat([b["words"].flatten() for b in batches(threshold=threshold).until(epochs=10)]).bincount(
        minlength=6
    )
    wanted = shares * expected
    assert (kept / kept.sum()).numpy() == pytest.approx(wanted / wanted.sum(), abs=0.02)


def test_noise_is_drawn_by_the_three_quarter_power_and_windows_evenly() -> None:
    seen = [(b["noise"], b["windows"]) for b in batches().until(epochs=3)]
    noise = torch.cat([n.flatten() for n, _ in seen]).bincount(minlength=6)
    expected = np.array(COUNTS) ** 0.75
    assert noise_chances(COUNTS) == pytest.approx(expected / expected.sum())
    assert (noise / noise.sum()).numpy() == pytest.approx(expected / expected.sum(), abs=0.01)
    reach = torch.cat([w.flatten() for _, w in seen]).bincount(minlength=6)
    assert reach[0] == 0
    assert (reach[1:] / reach.sum()).numpy() == pytest.approx(0.2, abs=0.01)


def test_epochs_differ_and_the_stream_goes_on_where_it_was() -> None:
    whole = list(batches(threshold=0.1).until(epochs=2))
    half = len(whole) // 2
    assert not whole[0]["words"].equal(whole[half]["words"])
    first, second = batches(threshold=0.1), batches(threshold=0.1)
    for _ in first.until(batches=half + 3):
        pass
    second.seek(first.position())
    for one, other in zip(whole[half + 3 :], second.until(epochs=2), strict=True):
        assert all(one[name].equal(other[name]) for name in one)


def test_a_text_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(DataError, match="Give more text"):
        SkipGramBatches(
            np.zeros(5, np.int64),
            np.zeros(5, np.int64),
            [5],
            batch_size=1,
            length=8,
            window=2,
            noise=4,
            threshold=0,
            seed=0,
        )
