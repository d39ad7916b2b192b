"""Wrong words over words of what a recognizer hears, in all and under each condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from millrace.data.batches import Batches
from millrace.models.ctc import edit_distance
from millrace.models.recognizer import Recognizer


def word_errors(
    model: Recognizer, read: Callable[[Tensor], str], batches: Batches, conditions: Sequence[str]
) -> dict[str, float]:
    """Words left out, put in or replaced, over words that were said.

    Args:
        model: hears.
        read: makes words of a path [T, V], such as the model's `words_of`.
        batches: of `millrace.data.speech`, with the number of its condition for every utterance, "version".
        conditions: their names; each occurs.

    Returns: "word_error" over all, and "word_error_NAME" under each condition.
    """
    errors: Counter[str] = Counter()
    spoken: Counter[str] = Counter()
    for batch in batches.one_pass():
        paths = model.heard(batch["features"], batch["frames"])
        for path_TV, letters, version in zip(paths, batch["letters"].tolist(), batch["version"].tolist(), strict=True):
            said, condition = model.text(letters).split(), conditions[version]
            errors[condition] += edit_distance(read(path_TV).split(), said)
            spoken[condition] += len(said)
    each = {f"word_error_{name}": errors[name] / spoken[name] for name in conditions}
    return {"word_error": errors.total() / spoken.total(), **each}
