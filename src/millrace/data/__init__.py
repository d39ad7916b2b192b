"""Data: whatever a user hands in becomes one resumable stream of batches; images, text and augmentation beside it."""

from millrace.data.augment import (
    compose,
    on_images,
    random_affine,
    random_colour,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
    random_shift,
)
from millrace.data.batches import Batch, Batches, Json
from millrace.data.images import ImageFolder, image_folder, read_image
from millrace.data.mapped import mapped
from millrace.data.prefetch import prefetched
from millrace.data.sources import as_batches
from millrace.data.split import Split, holdout
from millrace.data.text import CharVocabulary, python_text, split_text, text_batches

__all__ = [
    "Batch",
    "Batches",
    "CharVocabulary",
    "ImageFolder",
    "Json",
    "Split",
    "as_batches",
    "compose",
    "holdout",
    "image_folder",
    "mapped",
    "on_images",
    "prefetched",
    "python_text",
    "random_affine",
    "random_colour",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "random_shift",
    "read_image",
    "split_text",
    "text_batches",
]
