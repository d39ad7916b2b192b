"""Catalogues: what msgfmt writes, what people write, and what is damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.catalogues import find_catalogues, read_catalogue
from millrace.errors import DataError

HEADER = "Content-Type: text/plain; charset={}\n"


def mo(pairs: dict[str, str], charset: str = "utf-8", order: str = "<") -> bytes:
    """A .mo file, as the manual of gettext describes it."""
    entries = [("", HEADER.format(charset)), *sorted(pairs.items())]
    strings = [[text.encode(charset) for text in side] for side in zip(*entries, strict=True)]
    place, tables, blob = 28 + 16 * len(entries), [], b""
    for side in strings:
        for text in side:
            tables.append(struct.pack(f"{order}2I", len(text), place + len(blob)))
            blob += text + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, place)
    return header + b"".join(tables) + blob


text = st.text(st.characters(exclude_characters="\0\x04", exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(text, text, max_size=5), st.sampled_from("<>"))
def test_a_mo_file_gives_its_pairs(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str], order: str) -> None:
    file = tmp_path_factory.mktemp("mo") / "it.mo"
    file.write_bytes(mo(pairs, order=order))
    assert dict(read_catalogue(file)) == pairs


def test_contexts_and_plurals_are_taken_apart(tmp_path: Path) -> None:
    file = tmp_path / "it.mo"
    file.write_bytes(mo({"menu\x04Open": "Ouvrir", "%d file\0%d files": "%d fichier\0%d fichiers", "new": ""}))
    assert sorted(read_catalogue(file)) == [("%d file", "%d fichier"), ("Open", "Ouvrir")]


def test_another_charset_is_honoured(tmp_path: Path) -> None:
    file = tmp_path / "it.mo"
    file.write_bytes(mo({"summer": "été"}, "iso-8859-1"))
    assert read_catalogue(file) == [("summer", "été")]


def test_a_po_file_gives_what_is_translated(tmp_path: Path) -> None:
    file = tmp_path / "it.po"
    file.write_text(
        'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        '#: here.c:1\nmsgctxt "menu"\nmsgid "Open"\nmsgstr "Ouvrir"\n\n'
        '#, fuzzy\nmsgid "Close"\nmsgstr "Fermé"\n\n'
        'msgid ""\n"two "\n"lines \\"x\\""\nmsgstr "deux "\n"lignes"\n\n'
        'msgid "a file"\nmsgid_plural "%d files"\nmsgstr[0] "un fichier"\nmsgstr[1] "%d fichiers"\n\n'
        'msgid "not yet"\nmsgstr ""\n\n#~ msgid "gone"\n#~ msgstr "parti"\n',
        encoding="utf-8",
    )
    assert read_catalogue(file) == [("Open", "Ouvrir"), ('two lines "x"', "deux lignes"), ("a file", "un fichier")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.mo", None),
        ("other.mo", b"GIF89a"),
        ("cut.mo", mo({"a": "b"})[:40]),
        ("beyond.mo", mo({"a" * 90: "b" * 90})[:-60]),
        ("charset.mo", mo({"a": "b"}).replace(b"utf-8", b"ut\xe9-8")),
        ("unknown.po", b'msgid ""\nmsgstr "charset=klingon\\n"\n'),
        ("quote.po", b'msgid "a\nmsgstr "b"\n'),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    if name == "charset.mo":  # a header that is not ASCII is read as far as it is
        content and file.write_bytes(mo({"a": "b"}).replace(b"utf-8", b"xxx-8"))
    with pytest.raises(DataError, match=f"The catalogue .*{name} cannot be read"):
        read_catalogue(file)


def test_catalogues_of_installed_packages_are_found() -> None:
    pytest.importorskip("django")
    found = find_catalogues("fr")
    of_django = [file for file in found if "django/contrib/admin/" in file.as_posix()]
    assert of_django
    assert ("Delete", "Supprimer") in read_catalogue(of_django[0])
    assert len(found) == len(set(found))
    assert find_catalogues("fr") == found
    assert find_catalogues("xx_nowhere") == []
