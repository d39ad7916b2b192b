"""Cat: no face in two parts, no labels in training, and a unit for faces that is found and measured on unseen ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from millrace.errors import DataError
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.cat import SIDE, Cat, CatSettings
from millrace.zoo.run import Division, Finished, configure, configure_again, find_run, open_run, train
from millrace.zoo.run import test_values as values_on_test

TINY = [
    "compile=eager",
    "crops=110",
    "maps=2",
    "units=4",
    "batch_size=10",
    "steps=6",
    "checkpoint_every=3",
    "threads=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crosses on noise, and noise alone."""
    directory = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(0)
    for label in ("cross", "noise"):
        (directory / label).mkdir()
        for number in range(20):
            pixels = 60 + 40 * torch.randn(SIDE, SIDE, generator=generator)
            if label == "cross":
                pixels[11:14, 4:21] = pixels[4:21, 11:14] = 230
            picture = Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy())
            picture.save(directory / label / f"{number}.png")
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Faces, in a fifth of the default's pictures times steps."""
    settings = ["compile=eager", "steps=300", "batch_size=32", "crops=1100", "units=32", "threads=1"]
    run_dir = tmp_path_factory.mktemp("small") / "run"
    return train(configure("cat", settings), run_dir=run_dir, progress=False, device="cpu")


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, step: int, values: object) -> None:
        if step == self._step:
            run.stop()


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_what_is_measured_on_was_never_seen_and_training_has_no_labels() -> None:
    data = Cat(CatSettings(crops=550)).data()
    (test,) = data.test.one_pass()
    assert [int(test["belongs"][part].sum()) for part in (test["seen"], ~test["seen"])] == [50, 50]
    assert [int((~test["belongs"])[part].sum()) for part in (test["seen"], ~test["seen"])] == [250, 250]
    learned = torch.cat(list(data.train.one_pass()))
    assert learned.shape[1:] == (1, SIDE, SIDE)  # pictures, and nothing beside them
    new = rows(test["images"][~test["seen"]])
    (validation,) = data.validation.one_pass()
    assert not new & (rows(learned) | rows(validation) | rows(test["images"][test["seen"]]))
    assert not rows(learned) & rows(validation)
    faces = rows(test["images"][test["seen"] & test["belongs"]])
    share = sum(image.numpy().tobytes() in faces for image in learned) / len(learned)
    assert share == pytest.approx(0.3, abs=0.04)


def test_the_pictures_do_not_follow_from_the_seed() -> None:
    (one,), (other,) = (Cat(CatSettings(crops=110, seed=seed)).data().test.one_pass() for seed in (0, 5))
    assert one["images"].equal(other["images"])


def test_the_cat_is_against_other_photographs() -> None:
    data = Cat(CatSettings(crops=110, data="chelsea")).data()
    (test,) = data.test.one_pass()
    assert data.facts["target"] == "cat"
    assert int(test["belongs"].sum()) == 500
    assert len(test["belongs"]) == 1000


def test_a_unit_for_faces_is_found(small: Finished) -> None:
    """The bar of a small run: above chance by 0.2 (five standard errors), and above a network that learned nothing."""
    assert small.test["accuracy"] >= 0.7
    assert small.test["accuracy"] > small.test["untrained"]
    assert "tells face from the rest" in small.report
    pictures = small.result.run_dir / "pictures"  # type: ignore[operator]
    with Image.open(pictures / "top_stimuli.png") as sheet:
        assert sheet.size[0] > 12 * 3 * SIDE
    with Image.open(pictures / "optimal_stimulus.png") as stimulus:
        assert stimulus.size == (4 * SIDE, 4 * SIDE)


def test_an_opened_run_tells_pictures_of_any_size(small: Finished, tmp_path: Path) -> None:
    opened = open_run(find_run(str(small.result.run_dir)), "cpu")
    assert values_on_test(opened) == pytest.approx(dict(small.test), abs=1e-6)
    (test,) = opened.task.data(opened.facts).test.one_pass()
    new = test["images"][~test["seen"]]
    right = 0
    for index in (*range(8), *range(50, 58)):  # faces, and others
        pixels = ((new[index, 0] / 6 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).resize((100, 100), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
        said = opened.task.predict(opened.model, tmp_path / "large.png", opened.facts)
        right += said.values["belongs"] == (index < 50)
    assert right >= 10
    assert said.pictures["seen"].shape == (1, 4 * SIDE, 4 * SIDE)
    with pytest.raises(DataError, match="There is no image file"):
        opened.task.predict(opened.model, tmp_path / "none.png", opened.facts)


def test_a_folder_of_ones_own(folder: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data={folder}", "target=noise"]
    run = train(configure("cat", settings), run_dir=tmp_path / "run", progress=False, device="cpu")
    assert "tells noise from the rest" in run.report
    assert run.test["filter"] >= 0.9  # a seen cross tells crosses


@pytest.mark.parametrize(
    ("assignments", "message"),
    [(["data=/nowhere"], "no folder /nowhere"), (["target=dog"], "no class 'dog'. Set target to one of: cross, noise")],
)
def test_data_that_does_not_fit_is_refused(assignments: list[str], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        configure("cat", [f"data={folder}", *assignments]).data()


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    for label, count in (("cat", 3), ("dog", 5)):
        (tmp_path / label).mkdir()
        for number in range(count):
            Image.new("L", (30, 30), 40 * number).save(tmp_path / label / f"{number}.png")
    with pytest.raises(DataError, match="has 3 pictures of 'cat' and 5 others"):
        configure("cat", [f"data={tmp_path}"]).data()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Finished:
    return train(tiny(folder), run_dir=folder.parent / "alone", progress=False, device="cpu")


def tiny(folder: Path) -> Cat:
    task = configure("cat", [*TINY, f"data={folder}"])
    assert isinstance(task, Cat)
    return task


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_bit_for_bit(alone: Finished, folder: Path, tmp_path: Path) -> None:
    train(tiny(folder), run_dir=tmp_path / "run", progress=False, device="cpu", callbacks=[StopAt(3)])
    half = find_run(str(tmp_path / "run"))
    assert open_run(half, "cpu").step == 3
    train(configure_again(half), resume=half, progress=False, device="cpu")
    whole, rest = (
        open_run(find_run(str(path)), "cpu").model.state_dict() for path in (alone.result.run_dir, half.path)
    )
    assert all(whole[name].equal(rest[name]) for name in whole)


@pytest.mark.long
@pytest.mark.parametrize(
    "division",
    [Division(partitions=2), Division(replicas=2), Division(replicas=2, update="async")],
    ids=["partitions", "sync", "async"],
)
def test_it_trains_divided_as_it_is(division: Division, alone: Finished, folder: Path, tmp_path: Path) -> None:
    run = train(tiny(folder), run_dir=tmp_path / "run", progress=False, device="cpu", division=division)
    assert run.result.steps == 6
    if division.update == "sync":  # the others' numbers are another's
        assert run.result.evaluation["loss"] == pytest.approx(alone.result.evaluation["loss"], rel=1e-4)
