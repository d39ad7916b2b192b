"""CTC's readings: the paths that torch's own loss adds up, added up by hand, and words from a list."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from millrace.graph.training import training_graph
from millrace.models.ctc import BLANK, WordTree, beam_search, edit_distance, greedy
from millrace.optim.constructors import sgd
from millrace.runtime.session import Session


def frames(path: list[int], symbols: int, sure: float = 0.9) -> Tensor:
    """Log-probabilities [len(path), symbols] that are rather sure of a path."""
    probabilities = torch.full((len(path), symbols), (1 - sure) / (symbols - 1), dtype=torch.float64)
    probabilities[torch.arange(len(path)), torch.tensor(path)] = sure
    return probabilities.log()


def drawn(seed: int, count: int, symbols: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, symbols, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def likeliest_of_all(log_probabilities: Tensor) -> tuple[tuple[int, ...], float]:
    """By trying every path there is."""
    count, symbols = log_probabilities.shape
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(symbols), repeat=count):
        said = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK)
        weight = math.exp(sum(float(log_probabilities[t, symbol]) for t, symbol in enumerate(path)))
        sums[said] = sums.get(said, 0.0) + weight
    best = max(sums, key=lambda said: sums[said])
    return best, math.log(sums[best])


def test_greedy_leaves_repetitions_and_blanks_out() -> None:
    assert greedy(frames([0, 3, 3, 0, 3, 2, 2, 0, 0, 1], 4)) == [3, 3, 2, 1]
    assert greedy(frames([0, 0], 3)) == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_wide_beam_finds_what_all_paths_together_find_likeliest(seed: int) -> None:
    log_probabilities = drawn(seed, 5, 3)
    best, score = likeliest_of_all(log_probabilities)
    assert tuple(beam_search(log_probabilities, width=300, least=1e-30)) == best
    if best:  # and its probability is what torch's loss says
        loss = functional.ctc_loss(log_probabilities, torch.tensor(best), (5,), (len(best),), reduction="none")
        assert float(loss) == pytest.approx(-score, abs=1e-9)


def test_a_beam_adds_up_paths_where_the_likeliest_single_one_says_nothing() -> None:
    both = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()  # blank, blank is the likeliest path, with 0.36 against 0.64
    assert greedy(both) == []
    assert beam_search(both) == [1]


CAT, CAB, SPACE = [1, 2, 3], [1, 2, 4], 5


def test_words_from_a_list_are_said_and_no_others() -> None:
    tree = WordTree([CAT, CAB], SPACE)
    heard = frames([1, 2, 3, 5, 1, 2, 2, 0, 5, 4, 2, 4], 6, sure=0.5)  # "cat ca bab"
    said = beam_search(heard, width=50, words=tree, least=1e-9)
    words = "".join(map(str, said)).split(str(SPACE))
    assert words[0] == "123"
    assert set(words) <= {"123", "124"}
    assert beam_search(frames([1, 2, 4], 6), words=tree) == CAB
    assert beam_search(frames([0, 0, 0], 6), words=tree) == []


def test_without_any_whole_word_the_letters_are_given() -> None:
    assert beam_search(frames([1, 2], 6), width=1, words=WordTree([CAT], SPACE)) == [1, 2]


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_edit_distance_of_words() -> None:
    assert edit_distance(["call", "four", "now"], ["call", "for", "me", "now"]) == 2


def test_torchs_loss_in_a_traced_step_gives_its_values_and_gradients() -> None:
    """Texts of different lengths, one of them too long for its frames; and other lengths than it was traced with."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7).double()
    batch = {
        "features": torch.randn(4, 12, 5, dtype=torch.float64),
        "frames": torch.tensor([12, 9, 3, 12]),
        "letters": torch.tensor([[1, 2, 2, 3], [4, 0, 0, 0], [1, 1, 1, 1], [6, 5, 4, 3]]),
        "lengths": torch.tensor([4, 1, 4, 4]),
    }

    def loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        path = model(batch["features"]).log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(path, batch["letters"], batch["frames"], batch["lengths"], zero_infinity=True), {}

    expected = loss(model, batch)[0]
    expected.backward()
    traced_with = {**batch, "frames": torch.tensor([5, 12, 12, 7]), "lengths": torch.tensor([2, 3, 1, 4])}
    graph = training_graph(model, loss, sgd(1.0), traced_with)
    session = Session(graph, compile="eager", copy=True)
    value, _ = session.run(["loss", "train"], batch)
    assert torch.allclose(value, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(session.read(name), parameter - parameter.grad), name
