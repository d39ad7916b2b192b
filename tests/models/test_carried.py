"""State carried between steps: what is written is read, and the mean over replicas' slices is the same state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from millrace.models.carried import CarriedState

STREAMS, WIDTH = 6, 3


def numbers(seed: int, rows: int = STREAMS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def after(carried: CarriedState, stream: list[int], state: Tensor) -> dict[str, Tensor]:
    """The buffers as a replica that has these streams leaves them."""
    own = CarriedState(STREAMS, WIDTH)
    own.load_state_dict(carried.state_dict())
    own.write(torch.tensor(stream), state)
    return dict(own.state_dict())


def read(carried: CarriedState, fresh: tuple[int, ...] = ()) -> Tensor:
    flags = torch.tensor([stream in fresh for stream in range(STREAMS)])
    return carried.read(torch.arange(STREAMS), flags)


def test_at_first_there_is_nothing() -> None:
    assert read(CarriedState(STREAMS, WIDTH)).equal(torch.zeros(STREAMS, WIDTH))


def test_a_stream_gets_back_what_it_left() -> None:
    carried, state = CarriedState(STREAMS, WIDTH), numbers(0)
    carried.write(torch.tensor([5, 3, 1, 0, 2, 4]), state)
    assert carried.read(torch.tensor([3, 5]), torch.tensor([False, False])).equal(state[[1, 0]])


def test_a_stream_that_begins_gets_nothing() -> None:
    carried = CarriedState(STREAMS, WIDTH)
    carried.write(torch.arange(STREAMS), numbers(0))
    found = read(carried, fresh=(2,))
    assert found[2].equal(torch.zeros(WIDTH))
    assert found[3].equal(numbers(0)[3])


@given(st.permutations(range(STREAMS)), st.integers(1, STREAMS - 1))
def test_the_mean_over_slices_is_what_one_process_writes(order: list[int], cut: int) -> None:
    carried, state = CarriedState(STREAMS, WIDTH), numbers(1)
    carried.write(torch.arange(STREAMS), numbers(0))
    slices = [(order[:cut], cut / STREAMS), (order[cut:], 1 - cut / STREAMS)]
    parts = [(after(carried, streams, state[streams]), weight) for streams, weight in slices]
    carried.load_state_dict({name: sum(part[name] * weight for part, weight in parts) for name in parts[0][0]})
    assert torch.allclose(read(carried), state, rtol=1e-6)


@given(st.permutations(range(STREAMS)), st.integers(1, STREAMS - 1))
def test_parts_in_turn_are_what_one_batch_writes(order: list[int], cut: int) -> None:
    carried = CarriedState(STREAMS, WIDTH)
    for seed in range(3):
        before, state = read(carried), numbers(seed)
        for part in (order[:cut], order[cut:]):
            now = carried.read(torch.tensor(part), torch.zeros(len(part), dtype=torch.bool))
            assert now.equal(before[part]), "what the other part wrote changes nothing for this one"
            carried.write(torch.tensor(part), state[part])
        assert read(carried).equal(state)


def test_streams_of_a_slice_that_was_dropped_go_on_from_the_step_before() -> None:
    carried = CarriedState(STREAMS, WIDTH)
    carried.write(torch.arange(STREAMS), numbers(0))
    carried.load_state_dict(after(carried, [0, 1, 2], numbers(1, 3)))
    assert read(carried).equal(torch.cat([numbers(1, 3), numbers(0)[3:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_goes_through_it(dtype: torch.dtype) -> None:
    carried = CarriedState(STREAMS, WIDTH)
    state = numbers(0).to(dtype).requires_grad_()
    carried.write(torch.arange(STREAMS), state)
    found = read(carried)
    assert found.dtype == torch.float32
    assert not found.requires_grad
