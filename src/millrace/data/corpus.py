"""Running text by the paragraph: what Python's own files say in English, a user's files, or a Hugging Face data set."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from millrace.data.text import python_text
from millrace.data.text_files import read_text
from millrace.errors import DataError

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data"}
_LEAST_WORDS = 4  # of a paragraph
_CHUNK, _CHUNKS = 1000, 20  # words; of so many chunks in a row …
_TEST, _VALIDATION = (3, 9, 13, 17), (6,)  # … these are held out


def corpus(source: str) -> list[str]:
    """The paragraphs of a text, each once.

    Args: source: "" for what Python's standard library says in English; a text file; a directory of *.txt and *.md; or
        the name of a Hugging Face data set, such as "owner/name", of whose split "train" the column "text" is read, or
        else the first one that holds strings.

    Raises: DataError: it is none of these, cannot be read, or holds no text.
    """
    path = Path(source)
    if not source:
        texts: Iterable[str] = python_prose()
    elif path.is_dir():
        texts = _read_files(sorted(file for kind in ("*.txt", "*.md") for file in path.rglob(kind)), path)
    elif path.is_file():
        texts = _read_files([path], path)
    else:
        texts = _hub_texts(source)
    found = once(texts)
    if not found:
        raise DataError(f"{source or 'Python'} holds no paragraph of at least {_LEAST_WORDS} words. Give more text.")
    return found


def once(texts: Iterable[str]) -> list[str]:
    """The paragraphs of texts in their order, their blanks made one, and each kept once: a held-out part that repeats
    what was trained on would measure memory only. Those of less than four words are left out."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            words = paragraph.split()
            if len(words) >= _LEAST_WORDS:
                found.setdefault(" ".join(words))
    return list(found)


def divided(sentences: Sequence[list[str]]) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Sentences, as words, for training (15 of 20), validation (1) and the test (4), in chunks of some thousand words
    that lie together in the text.

    Raises: DataError: the text is too short to hold some of it out.
    """
    begins = itertools.accumulate((len(sentence) for sentence in sentences), initial=0)
    parts: tuple[list[list[str]], ...] = ([], [], [])
    for begin, sentence in zip(begins, sentences, strict=False):
        chunk = begin // _CHUNK % _CHUNKS
        parts[2 if chunk in _TEST else 1 if chunk in _VALIDATION else 0].append(sentence)
    train, validation, test = parts
    if not validation or not test:
        raise DataError(
            f"The text has {sum(map(len, sentences))} words, but at least {(_VALIDATION[0] + 1) * _CHUNK} are needed "
            "to hold some of it out. Give more text."
        )
    return train, validation, test


def python_prose() -> Iterator[str]:
    """What Python tells people: the language reference of help(), and the docstrings and comments of its standard
    library, module after module; some half a million words of English.

    Raises: DataError: this Python was installed without its sources.
    """
    yield python_text()
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(_sources(library))
    if not files:
        raise DataError(
            f"This Python has no sources in {library}, whose docstrings are the text to learn from. Give a text."
        )
    for file in files:
        try:
            with tokenize.open(file) as opened:
                source = opened.read()
            yield from _prose(source)
        except (SyntaxError, UnicodeDecodeError):  # some are written to be refused
            continue


def _sources(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and entry.name not in _NOT_PROSE:
            yield from _sources(entry)


def _prose(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old spellings in code that is only looked at
        tree = ast.parse(source)
    yield from _docstrings(tree)
    lines = (line.strip() for line in source.splitlines())
    yield "\n".join(line.lstrip("# ") if line.startswith("#") else "" for line in lines)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner)


def _read_files(files: list[Path], asked: Path) -> Iterator[str]:
    if not files:
        raise DataError(
            f"The directory {asked} holds no text: *.txt and *.md are looked for. Give another, or one file."
        )
    for file in files:
        yield read_text(file, "Give files of plain text.")


def _hub_texts(name: str) -> Iterable[str]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"There is no file or directory {name!r}, and no data set can be called so. Give a text.")
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"There is no file {name!r}; to read a Hugging Face data set of that name, its library is needed: "
            "pip install datasets"
        ) from error
    try:
        rows = library.load_dataset(name, split="train")
    except Exception as error:  # whatever the library, the network or the hub make of the name
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"There is neither a file nor a Hugging Face data set (split 'train') {name!r}: {reason}"
        ) from error
    texts = [
        column for column, kind in rows.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if not texts:
        raise DataError(
            f"The data set {name!r} has no column of strings, but {', '.join(rows.features)}. Give another."
        )
    return rows["text" if "text" in texts else texts[0]]
