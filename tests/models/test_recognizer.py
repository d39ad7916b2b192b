"""The recognizer: padding, what its symbols mean, words from a list."""

from __future__ import annotations

import torch

from millrace.models.recognizer import Recognizer


def recognizer(*words: str) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer("abc ", words, bands=6, stride=3, width=8, layers=1, dropout=0.0).eval()


def test_every_step_has_probabilities_and_padding_is_cut_off() -> None:
    model = recognizer()
    features = torch.randn(2, 30, 6)
    path = model(features)
    assert path.shape == (2, 10, 5)
    assert torch.allclose(path.exp().sum(-1), torch.ones(2, 10))
    first, second = model.heard(features, torch.tensor([30, 7]))
    assert first.shape == (10, 5)
    assert second.shape == (3, 5)
    assert torch.allclose(second, path[1, :3])


def test_frames_that_no_step_is_full_of_are_heard_too() -> None:
    model = recognizer()
    for frames in (29, 30, 31):
        assert model(torch.randn(1, frames, 6)).shape[1] == int(model.steps(torch.tensor(frames)))


def test_symbols_are_letters_and_words_come_from_the_list() -> None:
    model = recognizer()
    assert model.text([1, 0, 4, 2]) == "a b"
    path = torch.full((5, 5), 0.01)
    path[torch.arange(5), torch.tensor([1, 2, 0, 4, 3])] = 0.96
    assert model.letters_of(path.log()) == "ab c"
    assert recognizer("ab", "c").words_of(path.log()) == "ab c"
    assert recognizer("ab", "b").words_of(path.log()) == "ab b"
    assert recognizer("cab").words_of(path.log()) == "cab"


def test_a_picture_is_as_wide_as_the_frames() -> None:
    features = torch.randn(31, 6)
    (path,) = recognizer().heard(features[None], torch.tensor([31]))
    picture = recognizer().picture(features, path)
    assert picture.shape == (1, 6 + 5 + 3, 31 + 3)
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
