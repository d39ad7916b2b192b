"""Attention: weights, what may not be seen, heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from millrace.errors import SettingError
from millrace.models.attention import Attention, causal


def attention(heads: int) -> Attention:
    torch.manual_seed(0)
    return Attention(8, heads).double().eval()


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_scaled_dot_product_attention(heads: int) -> None:
    model = attention(heads)
    query, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    seen = torch.tensor([[True] * 5, [True, True, False, False, True]])[:, None]
    found, weights = model(query, memory, seen)
    key, value = model.key_value(memory).chunk(2, -1)
    parts = [part.view(2, -1, heads, 8 // heads).transpose(1, 2) for part in (model.query(query), key, value)]
    expected = functional.scaled_dot_product_attention(*parts, attn_mask=seen[:, None])
    assert torch.allclose(found, model.out(expected.transpose(1, 2).reshape(2, 3, 8)))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert weights[1, :, 2:4].eq(0).all()


def test_causal_lets_none_see_what_is_later() -> None:
    assert causal(3, 3, torch.device("cpu"))[0].tolist() == [[True, False, False], [True, True, False], [True] * 3]
    assert causal(1, 3, torch.device("cpu"))[0].tolist() == [[True] * 3]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SettingError, match="heads=3 must divide width=8"):
        Attention(8, 3)
