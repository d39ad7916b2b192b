"""Placeholders in messages, such as %(name)s, %d or {count}: kept out of a translator's hands, and put back.

What a program fills in must come out of a translation exactly as it went in, and its name says nothing about the
sentence. So the n-th placeholder becomes one character for "the n-th", in the message and its translation alike.
"""

from __future__ import annotations

import re

MARKS = tuple(chr(0xE000 + number) for number in range(10))  # of Unicode's private use: no text has them

_PLACEHOLDER = re.compile(
    r"""%\(\w+\)[#0+-]*[\d.*]*[diouxXeEfFgGcrsa]                                # Python: %(name)s
      | %(?:\d+\$)?[#0+'-]*[\d.*]*(?:hh|h|ll|l|z|j|t|L)?[diouxXeEfFgGcsmp](?!\w)  # C: %-5.2lf, %1$s
      | \{[\w.!:]*\}                                                             # str.format: {name}
      | \$\{?[A-Za-z_]\w*\}?                                                     # shells: ${name}
    """,
    re.VERBOSE,
)


def masked(text: str) -> tuple[str, list[str]] | None:
    """A text with marks for its placeholders, and these in their order; None where there are too many."""
    names = _PLACEHOLDER.findall(text)
    if len(names) > len(MARKS):
        return None
    marks = iter(MARKS)
    return _PLACEHOLDER.sub(lambda _: next(marks), text), names


def masked_like(text: str, names: list[str]) -> str | None:
    """A translation with the marks of its message's placeholders; None where it has others, or not the same ones."""
    free = dict(enumerate(names))
    parts, end = [], 0
    for found in _PLACEHOLDER.finditer(text):
        number = next((number for number, name in free.items() if name == found[0]), None)
        if number is None:
            return None
        del free[number]
        parts += [text[end : found.start()], MARKS[number]]
        end = found.end()
    return None if free else "".join(parts) + text[end:]


def restored(text: str, names: list[str]) -> str:
    """A text with placeholders for their marks; marks that have none are left out."""
    for number, mark in enumerate(MARKS):
        text = text.replace(mark, names[number] if number < len(names) else "")
    return text


def readable(text: str) -> str:
    """Marks of placeholders, and parts of characters, as people can read them."""
    return restored(text, [f"<{number}>" for number in range(1, len(MARKS) + 1)]).replace("\ufffd", "?")
