"""Text by the paragraph, its words and their vocabulary, and how it is divided."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from millrace.data.corpus import corpus, divided, once, python_prose
from millrace.data.vocabulary import WordVocabulary, words_of
from millrace.errors import DataError


def test_paragraphs_are_kept_once() -> None:
    texts = [
        "one two three four\n\ntoo short\n\nfive six\n  seven eight",
        "one two  three four\n\nnine ten eleven twelve",
    ]
    assert once(texts) == ["one two three four", "five six seven eight", "nine ten eleven twelve"]


@pytest.mark.long
def test_python_has_half_a_million_words_to_read() -> None:
    words = [word for text in once(python_prose()) for word in words_of(text)]
    assert 200_000 < len(words) < 2_000_000
    assert Counter(words).most_common(1)[0][0] == "the"


def test_files_and_directories_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("the second file is here")
    (tmp_path / "a.md").write_text("the first file is here\n\nand so is this")
    (tmp_path / "c.py").write_text("this is no text at all")
    assert corpus(str(tmp_path)) == ["the first file is here", "and so is this", "the second file is here"]
    assert corpus(str(tmp_path / "b.txt")) == ["the second file is here"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        corpus(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a.txt cannot be read: it is not UTF-8"):
        corpus(str(tmp_path))
    (tmp_path / "a.txt").write_text("one two\n")
    with pytest.raises(DataError, match="at least 4 words"):
        corpus(str(tmp_path))


class _Rows(dict):  # type: ignore[type-arg]
    @property
    def features(self) -> dict[str, SimpleNamespace]:
        return {name: SimpleNamespace(dtype="int64" if name == "label" else "string") for name in self}


def test_a_data_set_of_hugging_face_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> _Rows:
        if name != "someone/poems":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return _Rows(label=[1, 2], title=["a", "b"], text=["roses are very red", "violets are not red"])

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert corpus("someone/poems") == ["roses are very red", "violets are not red"]
    with pytest.raises(DataError, match=r"neither a file nor a Hugging Face data set .*'poems.txt'"):
        corpus("poems.txt")
    with pytest.raises(DataError, match=r"no file or directory '/some/poems.txt'"):
        corpus("/some/poems.txt")


def test_words_are_letters() -> None:
    assert words_of("Don't shout: __init__(x2) is naïve, isn\u2019t it?") == [
        "don't", "shout", "init", "x", "is", "naïve", "isn\u2019t", "it",
    ]  # fmt: skip


def test_a_vocabulary_numbers_frequent_words_first() -> None:
    sentences = [["b", "a", "b"], ["c", "a", "b"], ["d"]]
    found = WordVocabulary.of(sentences, least=2)
    assert (found.words, found.counts) == (("b", "a"), (3, 2))
    words, of = found.encode(sentences)
    assert (words.tolist(), of.tolist()) == ([0, 1, 0, 1, 0], [0, 0, 0, 1, 1])
    assert WordVocabulary.from_json(found.to_json()) == found
    with pytest.raises(DataError, match="'bb' is not among the 2 known"):
        found.numbers(["a", "bb"])
    with pytest.raises(DataError, match="lower min_count"):
        WordVocabulary.of(sentences, least=3)
    with pytest.raises(DataError, match="'words' and 'counts'"):
        WordVocabulary.from_json({"words": ["a"], "counts": []})


def test_parts_share_no_sentence_and_are_all_of_them() -> None:
    sentences = [[f"w{n}"] * 10 for n in range(6000)]
    train, validation, test = divided(sentences)
    assert [len(part) for part in (train, validation, test)] == [4500, 300, 1200]
    assert sorted(train + validation + test) == sorted(sentences)
    with pytest.raises(DataError, match="at least 7000"):
        divided(sentences[:100])
