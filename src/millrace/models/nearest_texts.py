"""The known text that is most like another one: what looking up reaches without any learning."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from millrace.errors import DataError


def nearest_texts(asked: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each text the number of the known one that shares the most, and the rarest, pieces of words with it.

    Pieces are of two to four characters, weighted by tf-idf; likeness is the cosine. Of equally near ones it is the
    first.

    Raises:
        DataError: scikit-learn is not installed.
    """
    vectorizer = _text_features().TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    pieces = vectorizer.fit(known)
    likeness = pieces.transform(asked) @ pieces.transform(known).T
    return [int(number) for number in likeness.argmax(axis=1).A1]


def _text_features() -> Any:
    try:
        return importlib.import_module("sklearn.feature_extraction.text")
    except ImportError as error:
        raise DataError(
            f"To compare texts takes scikit-learn, which cannot be imported ({error}). Install it with: "
            "pip install 'millrace[zoo]'"
        ) from error
