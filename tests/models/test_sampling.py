"""Sampling: temperature, the likeliest, the nucleus; draws follow the generator alone; a text is gone on with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.models.sampling import Sampling, continued

LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=9).map(lambda row: torch.tensor([row], dtype=torch.float64))
WAYS = st.builds(Sampling, st.floats(0, 4), st.integers(0, 9), st.floats(0.01, 1))


def of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@given(LOGITS, WAYS)
def test_what_may_be_drawn_are_the_likeliest_in_their_order(logits: Tensor, how: Sampling) -> None:
    found, whole = how.probabilities(logits)[0], logits[0]
    assert found.sum().item() == pytest.approx(1)
    drawable = found > 0
    assert whole[drawable].max() >= whole.max() - 1e-9
    if not drawable.all():
        assert whole[drawable].min() >= whole[~drawable].max() - 1e-9
    assert not how.top_k or int(drawable.sum()) <= how.top_k


@given(LOGITS, st.floats(0.2, 4))
def test_without_limits_it_is_the_softmax(logits: Tensor, temperature: float) -> None:
    assert torch.allclose(Sampling(temperature).probabilities(logits), (logits / temperature).softmax(-1))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(top_k=2), [0.5 / 0.8, 0, 0.3 / 0.8, 0]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=0.51), [0.5 / 0.8, 0, 0.3 / 0.8, 0]),
        (Sampling(top_p=0.81), [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        (Sampling(top_k=3, top_p=0.85), [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),  # of 0.95, 0.8 is less than 0.85
        (Sampling(top_k=3, top_p=0.84), [0.5 / 0.8, 0, 0.3 / 0.8, 0]),
        (Sampling(temperature=0.5), [0.25, 0.0025, 0.09, 0.0225]),
    ],
)
def test_limits(how: Sampling, expected: list[float]) -> None:
    found = how.probabilities(of(0.5, 0.05, 0.3, 0.15))[0]
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(found, wanted / wanted.sum())


def test_of_equals_the_first_are_kept() -> None:
    assert Sampling(top_k=2).probabilities(of(0.25, 0.25, 0.25, 0.25)).tolist() == [[0.5, 0.5, 0, 0]]


def test_without_temperature_it_takes_the_likeliest_and_leaves_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert Sampling(temperature=0).draw(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), generator).tolist() == [1, 0]
    assert generator.get_state().equal(before)


def test_draws_follow_the_probabilities_and_the_generator_alone() -> None:
    logits = of(0.1, 0.2, 0.7).expand(4000, 3)
    drawn = Sampling().draw(logits, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.bincount(minlength=3) / 4000, torch.tensor([0.1, 0.2, 0.7]), atol=0.03)
    assert drawn.equal(Sampling().draw(logits, torch.Generator().manual_seed(0)))
    assert not drawn.equal(Sampling().draw(logits, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_wrong_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_sampling_without_temperature_takes_the_likeliest() -> None:
    def counting(tokens: Tensor) -> Tensor:
        return nn.functional.one_hot((tokens + 1) % 5, 5).double()

    drawn = continued(counting, torch.tensor([3]), 6, window=4, temperature=0, generator=torch.Generator())
    assert drawn.tolist() == [4, 0, 1, 2, 3, 4]


def test_sampling_follows_the_probabilities_and_its_generator_alone() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7])

    def memoryless(tokens: Tensor) -> Tensor:
        return probabilities.log().expand(1, tokens.shape[1], 3)

    def drawn(seed: int, temperature: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return continued(memoryless, torch.tensor([0]), 2000, window=3, temperature=temperature, generator=generator)

    shares = drawn(0, 1.0).bincount(minlength=3) / 2000
    assert torch.allclose(shares, probabilities, atol=0.04)
    assert (drawn(0, 0.5) == 2).float().mean() > 0.85  # 0.49 / (0.01 + 0.04 + 0.49)
    assert drawn(0, 1.0).equal(drawn(0, 1.0))
    assert not drawn(0, 1.0).equal(drawn(1, 1.0))


def test_the_model_is_asked_for_no_more_than_its_window() -> None:
    asked: list[int] = []

    def model(tokens: Tensor) -> Tensor:
        asked.append(tokens.shape[1])
        return torch.zeros(1, tokens.shape[1], 4)

    assert len(continued(model, torch.arange(2), 5, window=4, temperature=1, generator=torch.Generator())) == 5
    assert asked == [2, 3, 4, 4, 4]
