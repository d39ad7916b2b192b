"""Pictures from disk: a folder with one subfolder per label, or a single file."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from millrace.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow raises for files that are cut short, damaged, or no images at all.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFolder:
    """All images of a folder, in memory."""

    images: Tensor  # float32 [n, channels, rows, cols], from 0 (black) to 1
    labels: Tensor  # int64 [n], indices into `classes`
    classes: list[str]  # names of the subfolders, sorted
    files: list[Path]  # [n]

    def __len__(self) -> int:
        return len(self.files)


def image_folder(
    directory: str | Path,
    rows: int | None = None,
    cols: int | None = None,
    channels: int | None = None,
    *,
    skip_corrupt: bool = False,
) -> ImageFolder:
    """Read `directory/<label>/*.png` (jpg, …) into memory, in the order of labels and file names.

    Args:
        directory: holds one subfolder per label.
        rows, cols: size in pixels to scale every image to; without them all images must be of one size.
        channels: 1 (grey), 3 (colour) or 4 (with transparency); without it 1 if all images are grey, else 3.
        skip_corrupt: leave unreadable images out, with a warning, instead of stopping.

    Raises:
        DataError: the directory is missing, or holds no images, an unreadable one, images of one label only, or
            images of unequal size while none is asked for.
    """
    directory = Path(directory)
    _check_size(rows, cols, channels)
    files = _image_files(directory)
    if channels is None:
        channels = 1 if all(_is_grey(file) for file in files) else 3
    read = list(_pixels(files, rows, cols, channels, skip_corrupt))
    if not read:
        raise DataError(f"None of the {len(files)} images in {directory} can be read: replace them.")
    kept = [file for file, _ in read]
    classes = sorted({file.parent.name for file in kept})
    if len(classes) == 1:
        raise DataError(
            f"All {len(kept)} images in {directory} have the one label {classes[0]!r}, but telling labels apart needs "
            "two at least. Give each label its own subfolder of images."
        )
    _check_equal_sizes(read)
    index = {name: number for number, name in enumerate(classes)}
    return ImageFolder(
        images=_as_floats(np.stack([pixels for _, pixels in read])),
        labels=torch.tensor([index[file.parent.name] for file in kept]),
        classes=classes,
        files=kept,
    )


def read_image(file: str | Path, rows: int | None = None, cols: int | None = None, channels: int = 3) -> Tensor:
    """One image as float32 [channels, rows, cols] from 0 (black) to 1, scaled to rows × cols where these are given.

    Raises:
        DataError: the file is missing or unreadable.
    """
    file = Path(file)
    _check_size(rows, cols, channels)
    if not file.is_file():
        raise DataError(f"There is no image file {file}. Check the path.")
    try:
        return _as_floats(_decoded(file, rows, cols, channels))
    except _UNREADABLE as error:
        raise DataError(f"The image {file} cannot be read ({_reason(error)}). Replace it by a whole one.") from error


def _check_size(rows: int | None, cols: int | None, channels: int | None) -> None:
    if (rows is None) != (cols is None):
        raise DataError(f"Images are scaled to rows and cols, but only one was given (rows={rows}, cols={cols}).")
    for name, value in (("rows", rows), ("cols", cols)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be a number of pixels from 1 on, but {value!r} was given.")
    if channels is not None and channels not in _MODES:
        raise DataError(f"channels must be 1 (grey), 3 (colour) or 4 (with transparency), but {channels!r} was given.")


def _image_files(directory: Path) -> list[Path]:
    """The image files under the label folders, sorted; hidden files and folders are passed over."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise DataError(f"The image directory {directory} {what}. Give a directory with one subfolder per label.")
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [file for folder in folders for file in sorted(folder.iterdir()) if _is_image(file)]
    if not files:
        loose = sum(_is_image(file) for file in directory.iterdir())
        found = f"{loose} images directly in it" if loose else "no images"
        raise DataError(
            f"The image directory {directory} has {found} and none in subfolders, but must hold "
            f"{directory.name}/<label>/*.png (or {', '.join(sorted(IMAGE_SUFFIXES - {'.png'}))}). "
            "Make one subfolder per label."
        )
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _is_grey(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return image.mode in _GREY_MODES
    except _UNREADABLE:
        return True  # reading the pixels says what is wrong


def _pixels(
    files: list[Path], rows: int | None, cols: int | None, channels: int, skip_corrupt: bool
) -> Iterator[tuple[Path, npt.NDArray[np.uint8]]]:
    """Each readable file with its pixels [channels, rows, cols]."""
    with ThreadPoolExecutor() as pool:  # decoders work outside Python's lock
        attempts = pool.map(_attempt, files, repeat(rows), repeat(cols), repeat(channels))
        for file, pixels in zip(files, attempts, strict=True):
            if not isinstance(pixels, Exception):
                yield file, pixels
            elif skip_corrupt:
                warnings.warn(f"The image {file} cannot be read ({_reason(pixels)}) and is left out.", stacklevel=3)
            else:
                raise DataError(
                    f"The image {file} cannot be read ({_reason(pixels)}). Delete or replace it, or pass "
                    "skip_corrupt=True to leave such images out."
                ) from pixels


def _attempt(file: Path, rows: int | None, cols: int | None, channels: int) -> npt.NDArray[np.uint8] | Exception:
    try:
        return _decoded(file, rows, cols, channels)
    except _UNREADABLE as error:
        return error


def _decoded(file: Path, rows: int | None, cols: int | None, channels: int) -> npt.NDArray[np.uint8]:
    with Image.open(file) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip instead of scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = image.convert(_MODES[channels])
    if rows is not None and cols is not None and image.size != (cols, rows):
        image = image.resize((cols, rows), Image.Resampling.BILINEAR)
    pixels = np.array(image, dtype=np.uint8)
    return pixels[np.newaxis] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _as_floats(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).to(torch.float32).div_(255)


def _check_equal_sizes(read: list[tuple[Path, npt.NDArray[np.uint8]]]) -> None:
    first_file, first = read[0]
    for file, pixels in read:
        if pixels.shape != first.shape:
            raise DataError(
                f"Images are of unequal size: {first_file} has {first.shape[1]} rows by {first.shape[2]} cols, {file} "
                f"has {pixels.shape[1]} by {pixels.shape[2]}. Pass rows and cols to scale all of them to one size."
            )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def write_png(image: Tensor, file: Path, frame_s: float = 1 / 15) -> None:
    """Write a picture, or a film as an animated PNG.

    Args:
        image: float [1 or 3, rows, cols], from 0 (black) to 1; what lies outside is cut off. A film has frames before
            these: [frames, 1 or 3, rows, cols].
        frame_s: how long each frame of a film is shown, in seconds.
    """
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    films = pixels if pixels.ndim == 4 else pixels[None]
    mode = {1: "L", 3: "RGB"}[films.shape[1]]
    arrays = films[:, 0].numpy() if mode == "L" else films.permute(0, 2, 3, 1).contiguous().numpy()
    first, *others = (Image.fromarray(array, mode) for array in arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    more = {"save_all": True, "append_images": others, "duration": 1000 * frame_s, "loop": 0} if others else {}
    first.save(file, format="PNG", optimize=True, **more)
