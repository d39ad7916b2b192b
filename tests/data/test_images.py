"""Folders of images on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from millrace.data import image_folder, read_image
from millrace.data.images import write_png
from millrace.errors import DataError


def write(file: Path, pixels: object, mode: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image if mode is None else image.convert(mode)).save(file)


def grey(value: int, rows: int = 2, cols: int = 3) -> np.ndarray:  # type: ignore[type-arg]
    return np.full((rows, cols), value, dtype=np.uint8)


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    write(tmp_path / "cat" / "b.png", grey(255))
    write(tmp_path / "cat" / "a.png", grey(0))
    write(tmp_path / "dog" / "c.png", grey(51))
    return tmp_path


def test_a_real_folder_of_digits_comes_back_exactly(tmp_path: Path) -> None:
    digits = load_digits()
    pixels = (digits.images * 15.9375).astype(np.uint8)  # 0 to 16 as 0 to 255
    for number, (image, label) in enumerate(zip(pixels[:150], digits.target, strict=False)):
        write(tmp_path / str(label) / f"{number:04}.png", image)
    folder = image_folder(tmp_path)
    assert folder.classes == [str(label) for label in range(10)]
    assert folder.images.shape == (150, 1, 8, 8)
    assert folder.images.dtype == torch.float32
    assert folder.labels.dtype == torch.int64
    numbers = [int(file.stem) for file in folder.files]
    assert sorted(numbers) == list(range(150))
    assert folder.labels.tolist() == digits.target[numbers].tolist()
    assert torch.equal(folder.images[:, 0], torch.from_numpy(pixels[numbers]) / 255)


def test_order_is_by_label_and_name(two_labels: Path) -> None:
    folder = image_folder(two_labels)
    assert [file.name for file in folder.files] == ["a.png", "b.png", "c.png"]
    assert folder.classes == ["cat", "dog"]
    assert folder.labels.tolist() == [0, 0, 1]
    assert torch.allclose(folder.images[:, 0, 0, 0], torch.tensor([0.0, 1.0, 0.2]))
    assert len(folder) == 3


def test_images_are_scaled_and_converted_as_asked(two_labels: Path) -> None:
    folder = image_folder(two_labels, rows=4, cols=5, channels=3)
    assert folder.images.shape == (3, 3, 4, 5)
    assert torch.allclose(folder.images[2], torch.tensor(0.2))


def test_one_colour_image_makes_all_colour(two_labels: Path) -> None:
    write(two_labels / "dog" / "red.jpg", np.tile(np.array([250, 0, 0], np.uint8), (2, 3, 1)))
    folder = image_folder(two_labels)
    assert folder.images.shape == (4, 3, 2, 3)
    red = folder.images[3].mean((1, 2))
    assert red[0] > 0.9
    assert red[1] < 0.1
    assert image_folder(two_labels, channels=1).images.shape == (4, 1, 2, 3)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    write(tmp_path / "deep.png", np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert torch.allclose(read_image(tmp_path / "deep.png", channels=1), torch.tensor([[[0, 100 / 255, 1]]]))


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(grey(9, rows=2, cols=3))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 3, 2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_image(two_labels: Path, channels: int) -> None:
    image = read_image(two_labels / "dog" / "c.png", rows=4, cols=4, channels=channels)
    assert image.shape == (channels, 4, 4)
    assert image.dtype == torch.float32
    assert torch.allclose(image[0], torch.tensor(0.2))


def test_other_files_and_hidden_ones_are_passed_over(two_labels: Path) -> None:
    (two_labels / "dog" / "notes.txt").write_text("no image")
    (two_labels / "dog" / ".c.png").write_text("no image")
    (two_labels / ".cache").mkdir()
    (two_labels / ".cache" / "x.png").write_text("no image")
    (two_labels / "empty").mkdir()
    assert image_folder(two_labels).classes == ["cat", "dog"]


def corrupt(folder: Path) -> Path:
    whole = folder / "cat" / "b.png"
    rng = np.random.default_rng(0)
    write(whole, rng.integers(0, 255, (30, 30), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:400])
    return whole


def test_a_corrupt_image_is_named_or_skipped(two_labels: Path) -> None:
    file = corrupt(two_labels)
    with pytest.raises(DataError, match=r"(?s)cat/b\.png cannot be read .*Delete.*skip_corrupt=True"):
        image_folder(two_labels)
    with pytest.warns(UserWarning, match=r"cat/b\.png cannot be read"):
        folder = image_folder(two_labels, skip_corrupt=True)
    assert file not in folder.files
    assert folder.images.shape == (2, 1, 2, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_files_that_are_no_images_are_named(two_labels: Path, content: bytes) -> None:
    (two_labels / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"dog/bad\.png cannot be read"):
        image_folder(two_labels)
    with pytest.raises(DataError, match=r"dog/bad\.png cannot be read"):
        read_image(two_labels / "dog" / "bad.png")


def test_bad_directories(two_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="nowhere does not exist"):
        image_folder(empty / "nowhere")
    with pytest.raises(DataError, match=r"a\.png is a file"):
        image_folder(two_labels / "cat" / "a.png")
    with pytest.raises(DataError, match="has no images"):
        image_folder(empty)
    with pytest.raises(DataError, match="has 2 images directly in it and none in subfolders"):
        image_folder(two_labels / "cat")
    write(empty / "only" / "a.png", grey(1))
    with pytest.raises(DataError, match=r"All 1 images .* have the one label 'only'"):
        image_folder(empty)
    with pytest.raises(DataError, match="no image file"):
        read_image(empty / "missing.png")


def test_every_image_corrupt(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="None of the 2 images"):
        image_folder(tmp_path, skip_corrupt=True)


def test_unequal_sizes_name_two_images(two_labels: Path) -> None:
    write(two_labels / "dog" / "d.png", grey(0, rows=5, cols=7))
    with pytest.raises(DataError, match=r"a\.png has 2 rows by 3 cols, .*d\.png has 5 by 7\. Pass rows and cols"):
        image_folder(two_labels)
    assert image_folder(two_labels, rows=2, cols=3).images.shape == (4, 1, 2, 3)


@pytest.mark.parametrize("size", [{"rows": 3}, {"cols": 3}, {"rows": 0, "cols": 2}, {"channels": 2}])
def test_bad_sizes(two_labels: Path, size: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"only one was given|must be"):
        image_folder(two_labels, **size)


def test_a_film_is_one_file_of_all_its_frames(tmp_path: Path) -> None:
    film = torch.rand(5, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    write_png(film, tmp_path / "films" / "film.png", frame_s=0.1)
    with Image.open(tmp_path / "films" / "film.png") as read:
        assert read.n_frames == 5
        for number, frame in enumerate(film):
            read.seek(number)
            assert read.info["duration"] == 100
            pixels = torch.from_numpy(np.array(read.convert("RGB"))).permute(2, 0, 1) / 255
            assert (pixels - frame).abs().max() < 0.003
