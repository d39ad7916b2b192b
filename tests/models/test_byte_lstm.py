"""A byte LSTM: its state is all that it knows of what came before, and windows of any length say the same of a text."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.streams import stream_batches
from millrace.models.byte_lstm import BYTES, ByteLstm, log2_probabilities
from millrace.models.sampling import Sampling


def lstm(orders: tuple[int, ...] = (2, 4), layers: int = 2) -> ByteLstm:
    torch.manual_seed(0)
    return ByteLstm(3, width=6, layers=layers, embedding=4, orders=orders, rows=64).double().eval()


def text(count: int) -> torch.Tensor:
    return torch.randint(BYTES, (count,), generator=torch.Generator().manual_seed(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.sampled_from([(), (1,), (2, 4)]), st.integers(1, 2))
def test_a_text_in_two_parts_is_the_text(cut: int, orders: tuple[int, ...], layers: int) -> None:
    model = lstm(orders, layers)
    inputs = text(2 * (12 + model.before)).view(2, -1)
    with torch.no_grad():
        whole, end = model.after(inputs)
        first, state = model.after(inputs[:, : model.before + cut])
        second, last = model.after(inputs[:, cut:], state)
    assert torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-12)
    assert torch.allclose(last, end, atol=1e-12)


def test_log2_probabilities_are_of_the_targets_and_carry_the_state() -> None:
    model = lstm()
    tokens = text(2 * 25)
    with torch.no_grad():
        padded = torch.cat([torch.zeros(2, model.before, dtype=torch.int64), tokens.view(2, 25)], dim=1)
        expected = model(padded[:, :-1]).log_softmax(-1).gather(-1, tokens.view(2, 25)[:, 1:, None])[..., 0]
    windows = [stream_batches(tokens, 2, length, model.before) for length in (24, 8, 6)]
    for batches in windows:
        found = log2_probabilities(model, batches)
        assert torch.allclose(found, expected / math.log(2), atol=1e-5)
    forgotten = log2_probabilities(model, windows[1], carry=False)
    assert torch.allclose(forgotten[:, :8], found[:, :8], atol=1e-5)
    assert not torch.allclose(forgotten[:, 8:], found[:, 8:], atol=1e-5)


def test_what_is_written_are_the_likeliest_bytes_one_by_one() -> None:
    model = lstm()
    written = model.written(b"ab", 5, Sampling(temperature=0), torch.Generator())
    so_far = [0] * model.before + list(b"ab")
    for byte in written:
        assert byte == int(model(torch.tensor([so_far]))[0, -1].argmax())
        so_far.append(byte)


@pytest.mark.parametrize(("orders", "before"), [((), 0), ((1,), 0), ((2, 6), 5)])
def test_it_looks_at_as_many_bytes_before_a_window_as_its_longest_sequence_needs(
    orders: tuple[int, ...], before: int
) -> None:
    model = lstm(orders)
    assert model.before == before
    assert model(torch.zeros(1, before + 3, dtype=torch.int64)).shape == (1, 3, BYTES)
