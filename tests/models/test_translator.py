"""A translator: a model that is right beforehand translates right, text by text and batch by batch, and is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("tokenizers")
from millrace.data.pairs import PairBatches
from millrace.data.subwords import END, START, Subwords
from millrace.models.beam import State
from millrace.models.encoder_decoder import Decoded, EncoderDecoder
from millrace.models.translator import Translator

WORDS = ["red", "green", "old", "file"]


class Copying(EncoderDecoder):
    """Writes its source again, and looks at the place that it writes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = torch.nn.Parameter(torch.zeros(vocabulary))

    def encode(self, source_BS: Tensor) -> State:
        return {"source": source_BS, "seen": source_BS != 0, "place": torch.zeros(len(source_BS), dtype=torch.int64)}

    def decode(self, previous_BT: Tensor, state: State) -> Decoded:
        place = state["place"].clamp(max=state["source"].shape[1] - 1)
        wanted = state["source"].gather(1, place[:, None])
        logits = 20 * functional.one_hot(wanted, len(self.vocabulary)).float()
        looked = functional.one_hot(place[:, None], state["source"].shape[1]).float()
        return Decoded(logits, looked, {"place": state["place"] + 1})


@pytest.fixture(scope="module")
def translator() -> Translator:
    subwords = Subwords.of(WORDS * 3, 300)
    return Translator(Copying(len(subwords)).eval(), subwords, width=3, length_penalty=0.6, coverage_penalty=0.2)


def test_a_text_becomes_its_translation(translator: Translator) -> None:
    for text in ("old red file", "green", "ünknown wörds too"):
        source_1S = translator.source(text)
        assert int(source_1S[0, -1]) == END
        assert translator.text(translator.best(source_1S)[0]) == text


def test_a_pass_has_every_pair_with_what_was_said(translator: Translator) -> None:
    pairs = [("old red", "alt rot"), ("green", "grün"), ("file file red", "Datei"), ("red", "rot"), ("old", "alt")]
    tokens = [tuple([*translator.subwords.encode(side), END] for side in pair) for pair in pairs]
    longest = max(len(side) for pair in tokens for side in pair)
    batches = PairBatches(tokens, 2, [(longest, longest)])  # type: ignore[arg-type]
    sources, references, said = translator.translated(batches)
    assert sorted(zip(sources, references, strict=True)) == sorted(pairs)
    assert said == sources


def test_a_picture_has_a_row_for_each_subword_written_and_the_end(translator: Translator) -> None:
    short, long = (translator.source(text) for text in ("red", "red old file green"))
    padded = functional.pad(short, (0, 9))
    pictures = [translator.picture(source[0], translator.best(source)[0]) for source in (short, padded, long)]
    assert pictures[0].shape[0] == 1
    assert pictures[0].equal(pictures[1])  # padding is not drawn
    assert pictures[2].shape[1] > pictures[0].shape[1]
    assert START not in translator.best(long)[0].tokens
