"""Translation catalogues (gettext's .mo and .po files): sentence pairs that come with installed programs.

Format: GNU gettext manual, chapter "The Format of GNU MO Files" and "The Format of PO Files".
"""

from __future__ import annotations

import ast
import re
import site
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from millrace.errors import DataError

Pair: TypeAlias = tuple[str, str]  # a message, and its translation

_LITTLE, _BIG = b"\xde\x12\x04\x95", b"\x95\x04\x12\xde"
_CHARSET = re.compile(r"charset=([\w.:-]+)")
_CONTEXT = "\x04"  # between what a message is about and the message
_NAMES = re.compile(r"iso_?\d")  # catalogues of nothing but names of countries, languages and currencies


def find_catalogues(language: str) -> list[Path]:
    """The catalogues of a language that installed Python packages and the system's programs carry, in a fixed order.

    Args: language: its code, such as "fr" or "pt_BR".
    """
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    shares = {f"{sys.base_prefix}/share", f"{sys.prefix}/share", "/usr/share", "/usr/local/share"}
    found: list[Path] = []
    for root in sorted(packages):
        found += sorted(Path(root).glob(f"**/locale/{language}/LC_MESSAGES/*.mo"))
    for root in sorted(shares):
        found += sorted(Path(root).glob(f"locale/{language}/LC_MESSAGES/*.mo"))
    once = {file.resolve(): file for file in found if not _NAMES.match(file.name)}
    return list(once.values())


def read_catalogue(file: Path) -> list[Pair]:
    """The messages of a .mo or .po file with their translations, the singular where there are plural forms.

    What is not translated, or marked as fuzzy, is left out.

    Raises:
        DataError: the file is missing, damaged, or neither of the two.
    """
    try:
        content = file.read_bytes()
        if content[:4] in (_LITTLE, _BIG):
            messages = _mo_messages(content)
        elif file.suffix == ".po":
            messages = list(_po_messages(content))
        else:
            raise ValueError("it does not begin like a .mo file, and its name does not end in .po")
    except (OSError, ValueError, LookupError, SyntaxError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"The catalogue {file} cannot be read: {reason}. Give one that msgfmt accepts.") from error
    pairs = [(message.rpartition(_CONTEXT)[2].split("\0")[0], said.split("\0")[0]) for message, said in messages]
    return [(message, said) for message, said in pairs if message and said]


def _mo_messages(content: bytes) -> list[Pair]:
    order = "<" if content[:4] == _LITTLE else ">"
    count, of_messages, of_translations = struct.unpack_from(f"{order}3I", content, 8)

    def text(table: int, number: int) -> bytes:
        length, begin = struct.unpack_from(f"{order}2I", content, table + 8 * number)
        if begin + length > len(content):
            raise ValueError(f"message {number} lies beyond the end of the file")
        return content[begin : begin + length]

    raw = [(text(of_messages, number), text(of_translations, number)) for number in range(count)]
    charset = _charset(next((said for message, said in raw if not message), b""))
    return [(message.decode(charset), said.decode(charset)) for message, said in raw]


def _charset(header: bytes) -> str:
    found = _CHARSET.search(header.decode("ascii", errors="ignore"))
    return found[1] if found and found[1] != "CHARSET" else "utf-8"


def _po_messages(content: bytes) -> Iterator[Pair]:
    """Entries are paragraphs of keywords with strings, which may go on over several lines."""
    text = content.decode(_charset(content))
    for entry in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        lines = [line.strip() for line in entry.split("\n")]
        if any(line.startswith("#,") and "fuzzy" in line for line in lines):
            continue
        strings: dict[str, str] = {}
        keyword = ""
        for line in lines:
            if not line or line.startswith("#"):
                continue
            if not line.startswith('"'):
                keyword, _, line = line.partition(" ")
            strings[keyword] = strings.get(keyword, "") + _unquoted(line.strip())
        if strings.get("msgid"):
            yield strings["msgid"], strings.get("msgstr", strings.get("msgstr[0]", ""))


def _unquoted(literal: str) -> str:
    value = ast.literal_eval(literal)
    if not isinstance(value, str):
        raise ValueError(f"expected a string in quotes, got {literal[:40]!r}")
    return value
