"""Digits: no scan in two parts, pictures of every kind read, and the bar that the default run has to pass."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from torch import Tensor

from millrace.errors import DataError
from millrace.zoo.digits import Digits, DigitsSettings
from millrace.zoo.run import Finished, Opened, configure, find_run, open_run, train
from millrace.zoo.run import test_values as values_on_test

# strokes in a square of 100 by 100, as a hand would draw them
STROKES = {
    0: [(50, 5), (28, 15), (20, 40), (20, 65), (30, 88), (50, 95), (70, 88), (80, 65), (80, 40), (72, 15), (50, 5)],
    1: [(35, 25), (52, 5), (52, 95)],
    2: [(25, 25), (35, 8), (60, 5), (75, 20), (72, 40), (25, 92), (25, 95), (80, 95)],
    3: [(25, 10), (55, 5), (72, 18), (70, 36), (45, 47), (70, 58), (76, 76), (60, 93), (25, 93)],
    4: [(65, 95), (65, 5), (20, 62), (85, 62)],
    7: [(20, 8), (80, 8), (45, 95)],
}


class Parts(NamedTuple):
    train: Tensor
    validation: Tensor
    test: Tensor


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The default run, seed included; eager, since a test's result should be the same everywhere."""
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    return train(configure("digits", ["compile=eager"]), run_dir=run_dir, progress=False, device="cpu")


@pytest.fixture(scope="module")
def opened(finished: Finished) -> Opened:
    return open_run(find_run(str(finished.result.run_dir)), "cpu")


def parts(**changes: float) -> Parts:
    """The images of the three parts, unchanged by augmentation."""
    data = Digits(DigitsSettings(turn=0, scale=0, shift=0, batch_size=1, **changes)).data()  # type: ignore[arg-type]
    return Parts(
        *(torch.cat([images for images, _ in part.one_pass()]) for part in (data.train, data.validation, data.test))
    )


def as_set(images: Tensor) -> set[bytes]:
    return {np.rint(image.numpy() * 16).astype(np.uint8).tobytes() for image in images}


def test_the_parts_share_no_scan_and_are_all_of_them() -> None:
    found = parts()
    assert [len(part) for part in found] == [1294, 144, 359]
    train_set, validation_set, test_set = map(as_set, found)
    assert not train_set & test_set
    assert not train_set & validation_set
    assert not validation_set & test_set
    scans = load_digits().images.astype(np.uint8)
    assert train_set | validation_set | test_set == {scan.tobytes() for scan in scans}


def test_the_held_out_scans_are_the_same_for_every_seed_and_every_digit_is_among_them() -> None:
    first, second = (Digits(DigitsSettings(seed=seed)).data() for seed in (0, 5))
    for one, other in ((first.test, second.test), (first.validation, second.validation)):
        ((images, labels),) = one.one_pass()
        ((others, _),) = other.one_pass()
        assert images.equal(others)
        assert labels.bincount(minlength=10).min() >= len(labels) // 10 - 1


def test_training_scans_are_changed_anew_in_every_epoch_and_by_the_seed_alone() -> None:
    data = Digits(DigitsSettings(batch_size=1294)).data().train
    again = Digits(DigitsSettings(batch_size=1294)).data().train
    epochs = [batch[0] for batch in data.until(epochs=2)]
    assert as_set(epochs[0]) != as_set(epochs[1])
    assert all(one.equal(other[0]) for one, other in zip(epochs, again.until(epochs=2), strict=True))


@pytest.mark.slow
def test_the_default_run_passes_the_bar(finished: Finished) -> None:
    assert finished.test["accuracy"] >= 0.985
    assert finished.result.steps == 600
    assert finished.result.evaluation["accuracy"] >= 0.97
    misread = round((1 - finished.test["accuracy"]) * 359)
    assert f"misread {misread} of 359 test scans" in finished.report


def test_an_opened_run_is_as_good_as_the_run_was(finished: Finished, opened: Opened) -> None:
    assert opened.step == 600
    assert values_on_test(opened) == pytest.approx(dict(finished.test), rel=1e-5)


def drawn(
    digit: int, pen: int, *, size: int = 280, paper: object = "white", ink: object = "black", mode: str = "RGB"
) -> Image.Image:
    """A digit in the middle of a picture, in half of its height."""
    image = Image.new(mode, (size, size), paper)  # type: ignore[arg-type]
    points = [(size / 4 + x * size / 200, size / 4 + y * size / 200) for x, y in STROKES[digit]]
    ImageDraw.Draw(image).line(points, fill=ink, width=pen, joint="curve")  # type: ignore[arg-type]
    return image


def said(opened: Opened, image: Image.Image, folder: Path) -> int:
    file = folder / "digit.png"
    image.save(file)
    digit = opened.task.predict(opened.model, file, opened.facts).values["digit"]
    assert isinstance(digit, int)
    return digit


CLEAR, WHITE, BLACK = (0, 0, 0, 0), (255, 255, 255, 255), (0, 0, 0, 255)


@pytest.mark.parametrize(
    "how",
    [
        {"pen": 22},
        {"pen": 6},
        {"pen": 22, "paper": "black", "ink": "white"},
        {"pen": 80, "size": 1000, "paper": (250, 240, 220), "ink": (40, 40, 120)},
        {"pen": 4, "size": 48},
        {"pen": 22, "paper": CLEAR, "ink": BLACK, "mode": "RGBA"},
        {"pen": 22, "paper": CLEAR, "ink": WHITE, "mode": "RGBA"},
        {"pen": 22, "paper": 255, "ink": 0, "mode": "L"},
    ],
    ids=[
        "dark on light",
        "thin",
        "light on dark",
        "big and coloured",
        "small",
        "transparent",
        "white on nothing",
        "grey",
    ],
)
def test_drawn_digits_are_read(how: dict[str, object], opened: Opened, tmp_path: Path) -> None:
    wrong = {digit: read for digit in STROKES if (read := said(opened, drawn(digit, **how), tmp_path)) != digit}  # type: ignore[arg-type]
    assert len(wrong) <= 1, wrong


def test_real_test_scans_are_read_from_files(opened: Opened, tmp_path: Path) -> None:
    ((images, labels),) = opened.task.data(opened.facts).test.one_pass()
    right = 0
    for image, label in zip(images[:60], labels[:60], strict=True):
        dark_on_light = 255 - (image[0] * 255).to(torch.uint8).numpy()
        right += (
            said(opened, Image.fromarray(dark_on_light).resize((120, 120), Image.Resampling.BICUBIC), tmp_path) == label
        )
    assert right >= 57


@pytest.mark.parametrize("paper", [BLACK, WHITE, CLEAR, (120, 120, 120, 255)])
def test_a_picture_without_a_digit_is_refused(paper: tuple[int, ...], opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digit.png shows no digit"):
        said(opened, Image.new("RGBA", (30, 20), paper), tmp_path)
    with pytest.raises(DataError, match="There is no image file"):
        opened.task.predict(opened.model, tmp_path / "none.png", opened.facts)


def test_one_black_pixel_still_has_an_answer(opened: Opened, tmp_path: Path) -> None:
    image = Image.new("L", (9, 5), 255)
    image.putpixel((4, 2), 0)
    assert said(opened, image, tmp_path) in range(10)
