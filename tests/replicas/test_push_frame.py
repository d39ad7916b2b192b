"""Pushes and acknowledgements as bytes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import FeedError
from millrace.graph.signature import TensorSpec
from millrace.replicas.push_frame import Push, Told, decode, decode_told, encode, encode_told
from millrace.replicas.shard_store import Rows

TABLES = {"a": TensorSpec((9, 3), torch.float32), "b": TensorSpec((9,), torch.bfloat16)}
numbers = st.integers(-(2**63), 2**63 - 1)


@given(
    st.lists(numbers, min_size=5, max_size=5), st.booleans(), st.dictionaries(st.sampled_from("ab"), st.integers(0, 5))
)
def test_a_push_comes_out_as_it_went_in(five: list[int], dense: bool, counts: dict[str, int]) -> None:
    rows = {
        table: Rows(torch.arange(n), torch.randn(n, *TABLES[table].shape[1:]).to(TABLES[table].dtype))
        for table, n in counts.items()
    }
    push = Push(five[0], five[1], five[2], five[3], five[4], 1.5, dense, rows)
    found = decode(bytearray(encode(push, list(TABLES))), TABLES)
    assert found.rows.keys() == rows.keys()
    for table, part in rows.items():
        assert torch.equal(found.rows[table].rows, part.rows)
        assert torch.equal(found.rows[table].values, part.values)
    assert {**vars(found), "rows": None} == {**vars(push), "rows": None}


@given(st.tuples(numbers, numbers, numbers))
def test_an_acknowledgement_comes_out_as_it_went_in(three: tuple[int, int, int]) -> None:
    assert decode_told(bytearray(encode_told(Told(*three)))) == Told(*three)


@given(st.data())
def test_what_is_cut_short_is_refused(data: st.DataObject) -> None:
    whole = encode(Push(1, 2, 3, 0, 1, 1.0, False, {"a": Rows(torch.arange(2), torch.ones(2, 3))}), list(TABLES))
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(FeedError, match="came as a push, but are none"):
        decode(bytearray(whole[:length]), TABLES)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_are_a_push(content: bytes) -> None:
    with contextlib.suppress(FeedError):
        assert isinstance(decode(bytearray(content), TABLES), Push)
