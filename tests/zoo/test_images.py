"""Images: photographs told apart, transfer to other classes, pictures of one's own, and every way to divide a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from tests.small import differing
from torch import Tensor

from millrace import Callback, Checkpoints
from millrace.data.images import write_png
from millrace.errors import DataError, SettingError
from millrace.replicas.settings import Async
from millrace.train.callbacks import RunView
from millrace.train.run_directory import RunDirectory
from millrace.zoo.base import TaskData
from millrace.zoo.images import Images, ImagesSettings
from millrace.zoo.run import Division, Finished, Opened, configure, find_run, open_run, train
from millrace.zoo.run import test_values as values_on_test

SMALL = [
    "compile=eager",
    "network=residual",
    "width=16",
    "blocks=1",
    "batch_size=32",
    "evaluate_every=1000",
    "checkpoint_every=1000",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A short run of a narrow network on half of the photographs."""
    task = configure("images", [*SMALL, "steps=80", "classes=half", "learning_rate=0.01"])
    return train(task, run_dir=tmp_path_factory.mktemp("images") / "run", progress=False, device="cpu")


@pytest.fixture(scope="module")
def opened(finished: Finished) -> Opened:
    return open_run(find_run(str(finished.result.run_dir)), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one's own: four classes with 15 each, of sizes of their own."""
    root = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(["ants", "bees", "cats", "dogs"]):
        row, col = torch.arange(24)[:, None], torch.arange(30)[None]
        waves = torch.sin(row * (0.3 + 0.5 * (number % 2))) * torch.cos(col * (0.3 + 0.5 * (number // 2)))
        for index in range(15):
            noise = 0.1 * torch.randn(3, 24, 30, generator=generator)
            write_png(0.5 + 0.4 * waves + noise, root / name / f"{index:02}.png")
    return root


def data(**changes: Any) -> TaskData:
    return Images(ImagesSettings(**changes)).data()


def weights(path: Path | None) -> dict[str, Tensor]:
    assert path is not None
    return dict(Checkpoints(path / "checkpoints").load().tensors)


# -- photographs -----------------------------------------------------------------------------------------------------


def test_a_short_run_passes_its_bar(finished: Finished, opened: Opened) -> None:
    assert finished.test["accuracy"] >= 0.6  # of ten classes; chance is 0.1
    assert finished.test["top5"] >= 0.93
    assert values_on_test(opened) == pytest.approx(dict(finished.test), rel=1e-5)
    wrong = round((1 - finished.test["accuracy"]) * 400)
    assert f"took {wrong} of 400 for others: " in finished.report
    assert finished.result.run_dir is not None
    assert (finished.result.run_dir / "pictures" / "test.png").stat().st_size < 400_000


def test_what_is_used_are_the_averages_of_the_weights(finished: Finished, opened: Opened) -> None:
    saved = weights(finished.result.run_dir)
    for name, parameter in opened.model.named_parameters():
        assert parameter.equal(saved[f"optimizer/{name}/average"])
        assert not parameter.equal(saved[name])


def test_a_patch_and_a_whole_photograph_are_named(opened: Opened, tmp_path: Path) -> None:
    images, labels = next(opened.task.data(opened.facts).test.one_pass())
    right = 0
    for image, label in zip(images[:40:4], labels[:40:4], strict=True):
        write_png(image, tmp_path / "patch.png")
        prediction = opened.task.predict(opened.model, tmp_path / "patch.png", opened.facts)
        right += prediction.values["class"] == opened.facts["classes"][int(label)]  # type: ignore[index, call-overload]
    with torch.no_grad():
        expected = opened.model(images[:40:4]).argmax(-1) == labels[:40:4]
    assert right == int(expected.sum())
    brick = opened.task.predict(opened.model, Path(skimage.data.__file__).parent / "grass.png", opened.facts)
    top5 = brick.values["top5"]
    assert isinstance(top5, dict)
    assert len(top5) == 5
    assert sum(top5.values()) <= 1.0001  # type: ignore[arg-type]
    assert "grass" in top5


def test_files_that_are_no_pictures_are_refused(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "it.png").write_text("no picture")
    for name in ("it.png", "none.png"):
        with pytest.raises(DataError, match=name):
            opened.task.predict(opened.model, tmp_path / name, opened.facts)


def test_training_sees_augmented_crops_and_evaluation_the_middle() -> None:
    found = data(batch_size=20, examples=2, colour=0.5)
    first, again = (next(iter(data(batch_size=20, examples=2, colour=0.5).train.until(epochs=1))) for _ in range(2))
    assert first[0].shape == (20, 3, 32, 32)
    assert first[0].equal(again[0])
    whole = torch.cat([images for images, _ in found.train.one_pass()])
    assert whole.shape == (40, 3, 32, 32)
    epochs = [batch[0] for batch in found.train.until(epochs=2)]
    assert not epochs[0].equal(epochs[2])


# -- transfer --------------------------------------------------------------------------------------------------------


def test_half_of_the_classes_and_the_rest_are_all() -> None:
    every, half, rest = (data(classes=which).facts["classes"] for which in ("all", "half", "rest"))
    assert len(every) == 20  # type: ignore[arg-type]
    assert sorted([*half, *rest]) == every  # type: ignore[misc]
    assert not set(half) & set(rest)  # type: ignore[arg-type]
    few = data(classes="rest", examples=3, batch_size=500).train
    labels = next(iter(few.one_pass()))[1]
    assert labels.bincount().tolist() == [3] * 10


@pytest.mark.long
def test_transfer_begins_with_the_other_runs_features_and_is_compared(
    finished: Finished, opened: Opened, tmp_path: Path
) -> None:
    source = str(finished.result.run_dir)
    options = [*SMALL, "classes=rest", "examples=5", f"transfer_from={source}"]
    task = configure("images", [*options, "steps=6"])
    model = task.model(task.data().facts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task.warm_start(model)
    changed = set(differing(before, model.state_dict()))
    own = opened.model.state_dict()
    features = {name for name in own if not name.startswith("readout.")}
    assert changed <= features
    assert differing({n: own[n] for n in features}, {n: model.state_dict()[n] for n in features}) == []
    done = train(task, run_dir=tmp_path / "run", progress=False, device="cpu")
    assert "\nfrom scratch on the same pictures: accuracy 0." in done.report
    assert open_run(RunDirectory.open(tmp_path / "run"), "cpu").facts["classes"] != opened.facts["classes"]


def test_transfer_from_another_network_is_refused(finished: Finished, tmp_path: Path) -> None:
    options = [*SMALL, "steps=1", f"transfer_from={finished.result.run_dir}", "width=8"]
    with pytest.raises(SettingError, match="has another network"):
        train(configure("images", options), run_dir=tmp_path / "run", progress=False, device="cpu")


# -- pictures of one's own, and divided runs -------------------------------------------------------------------------

OWN = [*SMALL, "size=16", "batch_size=12", "steps=40", "learning_rate=0.01"]
WAYS: dict[str, Division] = {
    "one process": Division(),
    "two blocks": Division(partitions=2),
    "two replicas": Division(replicas=2),
    "async": Division(replicas=2, update=Async(copies=False)),
}


class StopAfter(Callback):
    """Ends a run after a step."""

    def __init__(self, last: int) -> None:
        self._last = last

    def on_step(self, run: RunView, step: int, values: object) -> None:
        if step == self._last:
            run.stop()


def own_run(folder: Path, path: Path, *changes: str, **how: Any) -> Finished:
    task = configure("images", [*OWN, f"data={folder}", *changes])
    return train(task, progress=False, device="cpu", **({"run_dir": path} | how))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_ones_own_pictures_are_learned_in_every_way(way: str, folder: Path, tmp_path: Path) -> None:
    network = "inception" if way == "one process" else "residual"
    done = own_run(folder, tmp_path / "run", f"network={network}", division=WAYS[way])
    assert done.test["accuracy"] >= 0.6  # of twelve pictures of four classes
    opened = open_run(RunDirectory.open(tmp_path / "run"), "cpu")
    assert opened.facts["classes"] == ["ants", "bees", "cats", "dogs"]
    assert values_on_test(opened) == pytest.approx(dict(done.test), rel=1e-4)
    said = opened.task.predict(opened.model, folder / "bees" / "03.png", opened.facts)
    assert len(said.values["top5"]) == 4  # type: ignore[arg-type]


@pytest.mark.long
def test_a_resumed_run_ends_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    own_run(folder, tmp_path / "whole", "steps=9")
    own_run(folder, tmp_path / "parts", "steps=9", callbacks=[StopAfter(5)])
    own_run(folder, tmp_path / "parts", "steps=9", resume=RunDirectory.open(tmp_path / "parts"))
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        data(data=str(tmp_path / "none"))


@pytest.mark.parametrize("size", [16, 32, 48])
def test_a_larger_or_smaller_size_shows_the_same_part_of_a_picture(size: int) -> None:
    test = next(data(classes="half", size=size).test.one_pass())[0]
    same = next(data(classes="half").test.one_pass())[0]
    assert test.shape[-2:] == (size, size)
    scaled = torch.nn.functional.interpolate(same, (size, size), mode="bilinear", antialias=True)
    assert torch.allclose(test, scaled, atol=1e-5)
