"""What as_batches takes data for, and what it says about data that is none."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from millrace.data import Batches, ImageFolder, as_batches
from millrace.data.nest import leaves
from millrace.errors import DataError


def first(data: object, **options: Any) -> Any:
    return next(iter(as_batches(data, **options)))


def test_batches_stay_themselves() -> None:
    batches = as_batches(torch.ones(4))
    assert as_batches(batches) is batches


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.int16, np.uint8, np.bool_, np.complex64])
def test_numpy_keeps_its_dtype(dtype: type) -> None:
    array = np.arange(6).reshape(3, 2).astype(dtype)
    batch = first(array, shuffle=False)
    assert batch.dtype == torch.from_numpy(array).dtype
    assert np.array_equal(batch.numpy(), array)


def test_unusual_numpy_layouts_are_read() -> None:
    array = np.arange(6.0)
    for unusual in (array[::-1], array.astype(">f8"), np.broadcast_to(array, (2, 6)).T):
        assert np.array_equal(first(unusual, shuffle=False).numpy(), unusual)


def test_a_read_only_array_is_shared_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    array = np.arange(6.0)
    array.flags.writeable = False
    torch.set_warn_always(True)  # else torch warns once per process
    try:
        assert first(array, shuffle=False).tolist() == array.tolist()
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_structure_is_kept() -> None:
    Pair = namedtuple("Pair", ["x", "y"])
    batch = first(Pair(torch.ones(4, 2), OrderedDict(a=np.zeros(4))), batch_size=3)
    assert isinstance(batch, Pair)
    assert batch.x.shape == (3, 2)
    assert batch.y["a"].shape == (3,)


def test_tables_of_pandas_are_arrays() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    batch = first((frame, frame["a"]), shuffle=False)
    assert batch[0].tolist() == [[1, 3], [2, 4]]
    assert batch[1].tolist() == [1, 2]


def test_gradients_of_data_are_not_followed() -> None:
    assert not first(torch.ones(3, requires_grad=True)).requires_grad


def test_the_batch_size_is_32_or_everything_unless_given() -> None:
    assert len(first(torch.ones(50))) == 32
    assert len(first(torch.ones(20))) == 20


def test_drop_last_drops_only_the_short_batch_and_only_in_training() -> None:
    batches = as_batches(torch.ones(10), batch_size=4)
    assert [len(batch) for batch in batches.until(epochs=1)] == [4, 4]
    assert [len(batch) for batch in batches.one_pass()] == [4, 4, 2]


def test_an_image_folder_gives_images_and_labels() -> None:
    folder = ImageFolder(torch.rand(4, 1, 2, 2), torch.arange(4), list("abcd"), [Path("x")] * 4)
    images, labels = first(folder)
    assert torch.equal(images, folder.images[labels])


def test_a_list_is_batches_unless_a_batch_size_makes_it_examples() -> None:
    ones = [torch.ones(3), torch.ones(2)]
    assert [batch.shape for batch in as_batches(ones).until(epochs=1)] == [(3,), (2,)]
    pairs = [(torch.ones(3), 1), (torch.ones(3), 0)]
    assert first(pairs, batch_size=2)[0].shape == (2, 3)


def test_a_class_is_called_for_a_fresh_iterable() -> None:
    class Two:
        def __iter__(self) -> Any:
            return iter([torch.ones(1), torch.zeros(1)])

    assert len(list(as_batches(Two).until(epochs=2))) == 4


def test_numpy_arrays_within_batches_become_tensors() -> None:
    batch = first([{"x": [np.ones(2)], "y": np.float64(3)}])
    assert torch.equal(batch["x"][0], torch.ones(2, dtype=torch.float64))
    assert batch["y"].shape == ()


def test_hugging_face_formats_are_respected() -> None:
    table = datasets.Dataset.from_dict({"x": [[1, 2]] * 3, "y": [0, 1, 2], "text": ["a", "b", "c"]})
    assert set(first(table.with_format("torch", columns=["x", "y"]))) == {"x", "y"}
    assert set(first(table.with_format("numpy", columns=["x"]))) == {"x"}
    assert first(table.remove_columns("text"))["x"].dtype == torch.int64


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.ones(1)


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return torch.ones(index + 1)


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def words() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["a", "b"], "y": [0, 1]})


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no examples": (torch.ones(0, 3), {}, "the array is empty"),
    "no batches": ([], {}, "is empty: there must be at least one batch"),
    "no columns": ({}, {}, "empty dict"),
    "loader of nothing": (DataLoader(TensorDataset(torch.ones(0))), {}, "data set is empty"),
    "loader with too large a batch": (
        DataLoader(TensorDataset(torch.ones(3)), 5, drop_last=True),
        {},
        r"batch_size=5 \(the data set has 3\), and drop_last=True",
    ),
    "loader with an empty sampler": (
        DataLoader(TensorDataset(torch.ones(3)), 5, sampler=[]),
        {},
        "picks none of the 3 examples",
    ),
    "batch larger than data": (
        torch.ones(3),
        {"batch_size": 5},
        "has 3 examples, fewer than one batch of batch_size=5",
    ),
    "zero batch size": (torch.ones(3), {"batch_size": 0}, "batch_size must be a whole number from 1"),
    "fractional batch size": (torch.ones(3), {"batch_size": 1.5}, "batch_size must be a whole number"),
    "unequal lengths": (
        {"x": torch.ones(3), "y": [torch.ones(4)]},
        {},
        r"data\['x'\] has 3, data\['y'\]\[0\] has 4",
    ),
    "a single number": ((torch.ones(3), torch.tensor(1.0)), {}, r"data\[1\] is a single number"),
    "words": (np.array(["a", "b"]), {}, "dtype <U1, which no tensor can hold"),
    "objects": ((torch.ones(2), np.array([object(), None])), {}, r"batch\[1\] is a numpy array of dtype object"),
    "a string among arrays": ({"x": torch.ones(2), "name": "digits"}, {}, r"batch\['name'\] is 'digits' \(of type str"),
    "a path": (Path("images"), {}, r"image_folder\(directory\)"),
    "a number": (3, {}, "Data of type int cannot be read"),
    "unsized": (Unsized(), {}, "has no length"),
    "two batch sizes": (DataLoader(TensorDataset(torch.ones(3))), {"batch_size": 2}, "already comes in batches"),
    "two batch sizes again": (as_batches(torch.ones(3)), {"batch_size": 2}, "already comes in batches"),
    "batched generator": ((x for x in torch.ones(3)), {"batch_size": 2}, "already comes in batches"),
    "several splits": (
        datasets.DatasetDict(train=words(), test=words()),
        {},
        r"Choose a split, such as data\['train'\]",
    ),
}

BAD_WHEN_READ: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ragged examples": (Ragged(), {"drop_last": False}, "cannot be put together into a batch: stack expects"),
    "nothing among examples": ([None, None], {"batch_size": 2}, "cannot be put together into a batch"),
    "none in a batch": ([(torch.ones(1), None)], {}, r"batch\[1\] is None \(of type NoneType\)"),
    "an empty batch": ([()], {}, "empty tuple as a batch"),
    "column of words": (words(), {}, "column 'text' holds words"),
    "ragged column": (
        datasets.Dataset.from_dict({"x": [[1], [1, 2]]}),
        {},
        "column 'x' holds rows of different shapes",
    ),
    "stream of words": (words().to_iterable_dataset(), {"drop_last": False}, r"batch\['text'\]\[0\] is 'a'"),
    "empty stream": (Empty(), {}, "the Empty gave no batches"),
    "empty generator": ((x for x in ()), {}, "the generator <genexpr> gave no batches"),
    "no iterator": (lambda: 3, {}, "must return an iterator of batches each time it is called, but returned .* int"),
    "fixed iterator": ((lambda it: lambda: it)(iter([torch.ones(1)])), {}, "gave no batches in epoch 1, after 1 in"),
}


@pytest.mark.parametrize(("data", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data_is_refused_at_once(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_batches(data, **options)


@pytest.mark.parametrize(("data", "options", "message"), BAD_WHEN_READ.values(), ids=BAD_WHEN_READ.keys())
def test_bad_batches_are_refused_when_read(data: Any, options: dict[str, Any], message: str) -> None:
    batches = as_batches(data, **options)
    with pytest.raises(DataError, match=message):
        list(batches.until(epochs=2))


def test_an_error_in_users_code_comes_through_and_is_no_end_of_epoch() -> None:
    class Broken(Dataset[Any]):
        broken = True

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            if self.broken and index == 3:
                raise ZeroDivisionError("in the user's own code")
            return torch.tensor(index)

    broken = Broken()
    batches: Batches = as_batches(broken, batch_size=2, shuffle=False)
    read = [batches.advance()]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the user's own code"):
            batches.advance()
    broken.broken = False
    read += [batches.advance()]
    assert [number for batch in read for number in batch.tolist()] == [0, 1, 2, 3]


def test_leaves_name_their_places() -> None:
    nested = {"a": (torch.ones(1), [torch.ones(2)])}
    assert [where for where, _ in leaves(nested)] == ["batch['a'][0]", "batch['a'][1][0]"]
