"""Both encoder-decoders: padding, what comes later, one token at a time, and learning from the right ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from millrace.errors import SettingError
from millrace.models.beam import Beam
from millrace.models.encoder_decoder import PAD, EncoderDecoder, search, sequence_loss, shifted, token_accuracy
from millrace.models.lstm_encoder_decoder import LstmEncoderDecoder
from millrace.models.transformer_encoder_decoder import TransformerEncoderDecoder

START, END, VOCABULARY = 1, 2, 9
KINDS = ["lstm", "transformer"]


def model_of(kind: str) -> EncoderDecoder:
    torch.manual_seed(0)
    model = (
        LstmEncoderDecoder(VOCABULARY, VOCABULARY, width=8, layers=3)
        if kind == "lstm"
        else TransformerEncoderDecoder(VOCABULARY, VOCABULARY, width=8, layers=2, heads=2)
    )
    return model.double().eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_source_changes_nothing(kind: str) -> None:
    model, source, previous = model_of(kind), tokens(2, 4), tokens(2, 5, seed=1)
    padded = torch.cat([source, torch.full((2, 3), PAD)], 1)
    assert torch.allclose(model(source, previous), model(padded, previous), atol=1e-12)
    assert not torch.allclose(model(source, previous), model(source.flip(1), previous), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_depends_on_a_later_one_but_on_all_earlier_ones(kind: str) -> None:
    model, source, previous = model_of(kind), tokens(1, 4), tokens(1, 6, seed=1)
    for place in range(6):
        changed = previous.clone()
        changed[0, place] = 3 + (changed[0, place] - 2) % 6
        difference = (model(source, previous) - model(source, changed)).abs().amax(-1)[0]
        assert difference[:place].eq(0).all()
        assert (difference[place:] > 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_of_the_source_matters(kind: str) -> None:
    model, source = model_of(kind), tokens(1, 5)
    for place in range(5):
        changed = source.clone()
        changed[0, place] = 3 + (changed[0, place] - 2) % 6
        assert not torch.allclose(model(source, tokens(1, 1)), model(changed, tokens(1, 1)), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time_is_as_all_at_once(kind: str) -> None:
    model, source, previous = model_of(kind), tokens(3, 4), tokens(3, 5, seed=1)
    expected = model(source, previous).log_softmax(-1)
    state = model.encode(source)
    for place in range(5):
        said = model.step(previous[:, place], state)
        state = {**state, **said.state}
        assert torch.allclose(said.log_probs.double(), expected[:, place], atol=1e-5)
        assert said.attention is not None
        assert torch.allclose(said.attention.sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_finds_what_the_model_says(kind: str) -> None:
    model, source = model_of(kind), tokens(2, 4)
    for row, hypotheses in enumerate(search(model, source, Beam(START, END, 6, 5))):
        for found in hypotheses:
            target = torch.tensor([[*found.tokens, END]])
            said = model(source[row : row + 1], shifted(target, START)).log_softmax(-1)
            total = float(said.gather(-1, target[..., None]).sum().detach())
            assert found.log_prob == pytest.approx(total, abs=1e-4)


def test_the_lowest_layer_reads_backwards_from_the_end_of_each_source() -> None:
    model = model_of("lstm")
    assert isinstance(model, LstmEncoderDecoder)
    source = torch.tensor([[3, 4, 5, PAD, PAD], [6, 7, 8, 3, 4]])
    seen: list[Tensor] = []
    model.encoder.backwards.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(source)
    turned = model.encoder.embedding(torch.tensor([[5, 4, 3, PAD, PAD], [4, 3, 8, 7, 6]]))
    assert seen[0].equal(turned)


def test_teacher_forcing_gives_what_was_right_before() -> None:
    assert shifted(torch.tensor([[5, 6, END], [7, END, PAD]]), START).tolist() == [[START, 5, 6], [START, 7, END]]


def test_the_loss_and_the_accuracy_leave_padding_out() -> None:
    target = torch.tensor([[3, END, PAD], [4, 5, END]])
    logits = torch.zeros(2, 3, VOCABULARY)
    assert float(sequence_loss(logits, target)) == pytest.approx(math.log(VOCABULARY))
    logits[0, 2] = torch.randn(VOCABULARY) * 100  # where there is padding
    assert float(sequence_loss(logits, target)) == pytest.approx(math.log(VOCABULARY))
    logits[0, 0, 3] = logits[1, 1, 5] = logits[1, 2, END] = 9.0
    logits[0, 1, 7] = logits[1, 0, 7] = 9.0
    assert float(token_accuracy(logits, target)) == pytest.approx(3 / 5)
    assert float(sequence_loss(logits * 9, target, 0.1)) > float(sequence_loss(logits * 9, target)) / 9


def test_a_misfit_is_refused() -> None:
    with pytest.raises(SettingError, match="an even width and layers >= 2"):
        LstmEncoderDecoder(9, 9, width=8, layers=1)
    with pytest.raises(SettingError, match="must divide"):
        TransformerEncoderDecoder(9, 9, width=8, layers=1, heads=3)
