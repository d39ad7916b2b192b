"""espeak-ng: the same request gives the same samples, from a process or from the cache, and refusals say why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from millrace.data.commands import command, commands, speakers, spoken_commands, vocabulary
from millrace.data.espeak import Espeak, Utterance, spoken
from millrace.data.noise import loudness
from millrace.errors import DataError

loader = pytest.importorskip("espeakng_loader", reason="speech is made by the package espeakng-loader")
ESPEAK = Espeak(Path(loader.get_library_path()), Path(loader.get_data_path()))
FEW = [Utterance("seven two nine", "en-us+f3"), Utterance("turn on the light", "en+m1", 160, 40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    return tmp_path / "speech"


def test_speech_is_heard_and_the_same_each_time(cache: Path) -> None:
    first = spoken(FEW, ESPEAK, 8000)
    (kept,) = cache.iterdir()
    from_cache = spoken(FEW, ESPEAK, 8000)
    kept.unlink()
    made_again = spoken(FEW, ESPEAK, 8000)
    for one, cached, again in zip(first, from_cache, made_again, strict=True):
        assert one.dtype == torch.int16
        assert 0.5 < len(one) / 8000 < 2.5
        assert 300 < float(loudness(one.float())) < 20_000
        assert one.equal(cached)
        assert one.equal(again)


def test_voice_rate_pitch_and_words_are_all_heard() -> None:
    base = Utterance("seven two nine", "en-us+f3", 150, 40)
    others = [
        Utterance("seven two five", "en-us+f3", 150, 40),
        Utterance("seven two nine", "en-us+m3", 150, 40),
        Utterance("seven two nine", "en-us+f3", 190, 40),
        Utterance("seven two nine", "en-us+f3", 150, 70),
    ]
    (first,) = spoken([base], ESPEAK, 8000)
    for other in others:
        (said,) = spoken([other], ESPEAK, 8000)
        assert not said.equal(first), other
    assert len(spoken([others[2]], ESPEAK, 8000)[0]) < len(first)


def test_a_damaged_cache_is_made_again_and_an_unwritable_one_does_no_harm(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = spoken(FEW, ESPEAK, 8000)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert spoken(FEW, ESPEAK, 8000)[1].equal(first[1])
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("MILLRACE_CACHE", str(cache.parent / "file"))
    assert spoken(FEW, ESPEAK, 8000)[1].equal(first[1])


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot say 'hello' in the voice 'xx-none'"):
        spoken([Utterance("hello", "xx-none")], ESPEAK, 8000)
    with pytest.raises(DataError, match="espeak-ng could not speak"):
        spoken(FEW, Espeak(Path("/nowhere/libespeak-ng.so"), ESPEAK.data), 8000)
    with pytest.raises(DataError, match="no words to say in ' …'"):
        spoken([Utterance(" …", "en-us")], ESPEAK, 8000)


def test_commands_are_of_the_vocabulary_differ_and_avoid_what_is_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    held_out = frozenset(command(generator) for _ in range(100))
    found = commands(500, generator, held_out)
    assert len(set(found)) == 500
    assert not set(found) & held_out
    assert set(" ".join(found).split()) <= set(vocabulary())
    assert len(vocabulary()) < 100


def test_parts_share_no_speaker_and_no_text() -> None:
    parts = speakers(ESPEAK, seed=0)
    families = [{name.rstrip("0123456789").lower() for name in part} for part in parts]
    assert not families[0] & families[1]
    assert not families[0] & families[2]
    assert not families[1] & families[2]
    assert len(parts[0]) > 3 * len(parts[2]) > 20
    train, validation, test = spoken_commands(ESPEAK, 8000, (20, 5, 8), 2.4, 0)
    assert not set(train.texts) & set(test.texts)
    assert not set(validation.texts) & set(test.texts) | set(validation.texts) & set(train.texts)
    assert all(len(recording) <= 2.4 * 8000 for recording in train.recordings)
    assert len(train.texts) == len(train.recordings) >= 18
