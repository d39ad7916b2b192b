"""Parallel text: from whatever people have, without leaks between its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.parallel_text import read_pairs, reversals, split_by_message
from millrace.data.placeholders import MARKS
from millrace.errors import DataError


def po(file: Path, **messages: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(f'msgid "{source}"\nmsgstr "{target}"' for source, target in messages.items()))


def test_a_file_of_lines_gives_its_pairs(tmp_path: Path) -> None:
    file = tmp_path / "it.tsv"
    file.write_text("hello  %s\tbonjour %s\nhello %s\tsalut %s\nnothing %d\trien\nbye\tau revoir\n")
    assert read_pairs(str(file), "fr") == [(f"hello {MARKS[0]}", f"bonjour {MARKS[0]}"), ("bye", "au revoir")]


def test_a_directory_gives_the_catalogues_of_the_language(tmp_path: Path) -> None:
    po(tmp_path / "a" / "fr.po", open="ouvrir")
    po(tmp_path / "de" / "LC_MESSAGES" / "x.po", open="öffnen")
    assert read_pairs(str(tmp_path), "fr") == [("open", "ouvrir")]
    assert read_pairs(str(tmp_path), "de") == [("open", "öffnen")]
    assert read_pairs(str(tmp_path / "a" / "fr.po"), "xx") == [("open", "ouvrir")]


def test_installed_packages_have_thousands_of_words_in_french_and_german() -> None:
    pytest.importorskip("django")
    for language, translation in (("fr", "Supprimer"), ("de", "Löschen")):
        pairs = read_pairs("", language)
        assert len(pairs) > 700
        assert len({source for source, _ in pairs}) == len(pairs)
        assert dict(pairs)["Delete"] == translation


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.tsv", None, "cannot be read"),
        ("bytes.tsv", b"\xff\xfe", "not UTF-8"),
        ("one.tsv", b"a\tb\nno tab here\n", "Line 2 of"),
        ("empty.tsv", b"", "holds no sentence pairs"),
        ("broken.mo", b"nothing", "catalogue"),
    ],
)
def test_a_misfit_is_named(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_pairs(str(file), "fr")


def test_a_language_that_nobody_speaks_is_named() -> None:
    with pytest.raises(DataError, match="No installed package has translations to language='xx_nowhere'"):
        read_pairs("", "xx_nowhere")


words = st.lists(st.sampled_from(["open", "file", "Open", "close", "a", "3", "%", ":"]), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.sets(words.map(" ".join), max_size=30))
def test_parts_share_no_message(sources: set[str]) -> None:
    pairs = [(source, source.upper()) for source in sorted(sources)]
    parts = split_by_message(pairs, 0.3, 0.3)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    keys = [{"".join(c for c in source.lower() if c.isalpha()) for source, _ in part} for part in parts]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    more = split_by_message([*pairs, ("something else", "x")], 0.3, 0.3)
    assert all(set(part) <= set(grown) for part, grown in zip(parts, more, strict=True))


def test_parts_have_about_their_share() -> None:
    train, validation, test = split_by_message(reversals(8000, 30), 0.1, 0.2)
    assert len(validation) / 8000 == pytest.approx(0.1, abs=0.02)
    assert len(test) / 8000 == pytest.approx(0.2, abs=0.02)
    assert len(train) > 5000


def test_reversals_are_reversed_and_substituted() -> None:
    pairs = reversals(300, 6)
    key: dict[str, str] = {}
    for source, target in pairs:
        for a, b in zip(source.split(), reversed(target.split()), strict=True):
            assert key.setdefault(a, b) == b
    assert len(set(key.values())) == len(key) > 20
    assert any(a != b for a, b in key.items())
    assert {len(source.split()) for source, _ in pairs} == set(range(1, 7))
    assert reversals(300, 6) == pairs != reversals(300, 6, seed=1)
