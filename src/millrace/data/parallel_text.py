"""Sentences with their translations, from wherever people keep them, and in parts that share no message."""

from __future__ import annotations

import hashlib
import importlib
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from millrace.data.catalogues import Pair, find_catalogues, read_catalogue
from millrace.data.placeholders import masked, masked_like
from millrace.data.text_files import read_text
from millrace.errors import DataError

_PAIRS_AS = (
    "a .mo or .po file, a directory of them, a .tsv file of lines with source, tab, translation, or a Hugging Face "
    "data set with a column 'translation'"
)
_SENTENCES = "Give plain text, a sentence a line."


def read_pairs(data: str, language: str) -> list[Pair]:
    """Sentence pairs in a fixed order, every source once, with marks for placeholders; see `masked`.

    Args:
        data: a .mo, .po or .tsv file, a directory of catalogues, or the name of a Hugging Face data set; "" for the
            catalogues of what is installed.
        language: of the translations; of catalogues in a directory, those that name it (in "fr.po", "fr/…") are
            taken, or all where none does.

    Raises:
        DataError: there is no such thing, it cannot be read, or it holds no pairs.
    """
    if not data:
        pairs = _one_line(_of_catalogues(find_catalogues(language), damaged_too=True))
        cure = f"No installed package has translations to language={language!r}. Install one that has, such as django, "
        cure += f"or set data to {_PAIRS_AS}."
    else:
        pairs = _one_line(_named(data, language))
        cure = f"{data} holds no sentence pairs. Give {_PAIRS_AS}."
    if not pairs:
        raise DataError(cure)
    return pairs


def _named(data: str, language: str) -> Iterable[Pair]:
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.[mp]o") if file.suffix in (".mo", ".po"))
        ours = [f for f in files if language in (f.stem, *f.relative_to(path).parent.parts)]
        return _of_catalogues(ours or files, damaged_too=False)
    if path.suffix in (".mo", ".po"):
        return read_catalogue(path)
    if path.exists() or path.suffix in (".tsv", ".txt"):
        return _of_lines(path)
    return _of_hub(data, language)


def _of_catalogues(files: Sequence[Path], *, damaged_too: bool) -> Iterator[Pair]:
    """damaged_too: pass over what cannot be read, since what is installed is what it is."""
    for file in files:
        try:
            yield from read_catalogue(file)
        except DataError:
            if not damaged_too:
                raise


def _of_lines(file: Path) -> Iterator[Pair]:
    for number, line in enumerate(read_text(file, _SENTENCES).splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) != 2:
            raise DataError(
                f"Line {number} of {file} must be a source, a tab and its translation, but has {len(parts)} parts: "
                f"{line[:60]!r}."
            )
        yield parts[0], parts[1]


def _of_hub(name: str, language: str) -> list[Pair]:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"There is no file {name!r}; to read a Hugging Face data set of that name, its library is needed: "
            "pip install datasets"
        ) from error
    try:
        rows: Any = library.load_dataset(name, split="train")
    except Exception as error:  # whatever the library, the network or the hub make of the name
        reason = str(error).partition("\n")[0]
        raise DataError(f"There is neither a file nor a Hugging Face data set {name!r}: {reason}") from error
    first: dict[str, Any] = next((row.get("translation", {}) for row in rows), {})
    source = next((code for code in first if code != language), None)
    if language not in first or source is None:
        raise DataError(f"The data set {name!r} has no column 'translation' with {language!r} beside another language.")
    return [(row["translation"][source], row["translation"][language]) for row in rows]


def _one_line(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs of one line each, white space made plain, placeholders marked; of two for one source the first."""
    found: dict[str, str] = {}
    for source, target in pairs:
        if "\n" in source.strip() or "\n" in target.strip() or not any(c.isalpha() for c in source):
            continue
        marked = masked(" ".join(source.split()))
        translation = None if marked is None else masked_like(" ".join(target.split()), marked[1])
        if marked and translation:
            found.setdefault(marked[0], translation)
    return list(found.items())


def read_sentences(file: Path) -> list[str]:
    """The lines of a text that are not empty, white space made plain.

    Raises:
        DataError: the file is missing, no text, or empty.
    """
    lines = [" ".join(line.split()) for line in read_text(file, _SENTENCES).splitlines()]
    if not any(lines):
        raise DataError(f"The text file {file} is empty: give a sentence a line.")
    return [line for line in lines if line]


def split_by_message(
    pairs: Sequence[Pair], validation: float = 0.015, test: float = 0.025
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Pairs in three parts: to train on, to validate, and to test; each part has about such a share.

    Messages that differ in case, punctuation, numbers or placeholders only are of the same part. Which one follows from
    the message alone, so that it stays there whatever else is installed.
    """
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in pairs:
        letters = "".join(c for c in pair[0].lower() if c.isalpha())
        place = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "big") / 2**64
        parts[2 if place < test else 1 if place < test + validation else 0].append(pair)
    return parts


def reversals(count: int, longest: int, seed: int = 0) -> list[Pair]:
    """A made-up language for which attention is needed: words backwards, each replaced by another.

    Args:
        count: pairs; every source once.
        longest: words of a source, which are the letters a to z; every length from 1 on is equally frequent, as far
            as there are so many sources.
        seed: of the sources. The substitution is always the same.
    """
    letters = string.ascii_lowercase
    key = dict(zip(letters, random.Random(0).sample(letters, len(letters)), strict=True))
    draw = random.Random(seed)
    found: dict[str, str] = {}
    for _ in range(count):
        source = draw.choices(letters, k=draw.randint(1, longest))
        found.setdefault(" ".join(source), " ".join(key[letter] for letter in reversed(source)))
    return list(found.items())
