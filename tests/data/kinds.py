"""One factory for every kind of data: each call builds it anew, as a new process would."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
except ImportError:  # torchdata is optional
    StatefulDataLoader = None

from millrace.data import Batches, as_batches, mapped, prefetched, text_batches


def rows(n: int) -> torch.Tensor:
    """[n, 2] with the number of the example in column 0."""
    return torch.stack([torch.arange(n, dtype=torch.float32), torch.arange(n) * 0.5], 1)


class Noisy(Dataset[Any]):
    """Examples with noise from every generator that users' code may draw from."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rng = np.random.default_rng(3)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [torch.rand(()).item(), random.random(), np.random.rand(), self.rng.random()]  # noqa: NPY002
        return {"index": index, "noise": torch.tensor(noise, dtype=torch.float64)}


class WholeBatches(Dataset[Any]):
    """`data[i]` is a batch."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return rows(self.n)[index : index + 1] + torch.rand(2), np.array([index])


class DrawsAsItGoes(Sampler[int]):
    """Draws from the global generator before every index."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.n):
            yield int(torch.randint(self.n, ()).item())

    def __len__(self) -> int:
        return self.n


class DrawsAtOnce(Sampler[int]):
    """Draws from the global generators when iteration begins, before the first index is asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.n).tolist()
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return self.n


class NoisyStream(IterableDataset[Any]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(self.n).tolist():
            yield index, torch.rand(2), np.random.rand()  # noqa: NPY002


class StatefulStream(IterableDataset[Any]):
    """A stream that saves its own place."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.next_index = 0
        self.sought = False

    def __iter__(self) -> Iterator[Any]:
        if not self.sought:
            self.next_index = 0
        self.sought = False
        while self.next_index < self.n:
            self.next_index += 1
            yield self.next_index - 1, torch.rand(1)

    def state_dict(self) -> dict[str, Any]:
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_index, self.sought = state["next_index"], True


class StatefulIterator:
    """Its own iterator, of batches, with a state."""

    def __init__(self, n: int) -> None:
        self.n, self.at, self.reads = n, 0, 0

    def __iter__(self) -> StatefulIterator:
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == self.n:
            raise StopIteration
        self.at += 1
        self.reads += 1
        return torch.tensor([self.at - 1.0]) + torch.rand(1)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Shuffling:
    """An iterable of batches that shuffles with a generator of its own."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rng = np.random.default_rng(5)
        self.python = random.Random(5)
        self.torch = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[Any]:
        for index in self.rng.permutation(self.n):
            yield {"index": np.array([index]), "noise": [torch.rand(1, generator=self.torch) + self.python.random()]}


def table(n: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": rows(n).tolist(), "y": list(range(n))})


def noisy_table(n: int) -> datasets.Dataset:
    def transform(columns: dict[str, Any]) -> dict[str, Any]:
        return {"y": torch.tensor(columns["y"]) + torch.rand(len(columns["y"]))}

    return table(n).with_transform(transform)


def stream(n: int) -> datasets.IterableDataset:
    return table(n).to_iterable_dataset(num_shards=min(n, 2))


def words(n: int, batch: int) -> str:
    return "".join(chr(97 + (i * i + i // 7) % 26) for i in range(5 * (n + batch) + 9))


def lazily(n: int) -> Callable[[], Iterator[Any]]:
    def make() -> Iterator[Any]:
        for index in torch.randperm(n).tolist():
            yield torch.tensor([index]), torch.rand(2)

    return make


def tensors(n: int) -> TensorDataset:
    return TensorDataset(rows(n), torch.arange(n))


Make = Callable[[int, int, int], Batches]  # (examples, batch size, seed)

EXAMPLES: dict[str, Make] = {
    "tensor": lambda n, b, s: as_batches(rows(n), batch_size=b, seed=s, drop_last=False),
    "numpy": lambda n, b, s: as_batches(rows(n).numpy(), batch_size=b, seed=s, drop_last=False),
    "tuple": lambda n, b, s: as_batches((rows(n), np.arange(n)), batch_size=b, seed=s, drop_last=False),
    "dict": lambda n, b, s: as_batches(
        {"x": {"a": rows(n)}, "y": (np.arange(n),)}, batch_size=b, seed=s, drop_last=False
    ),
    "Dataset": lambda n, b, s: as_batches(Noisy(n), batch_size=b, seed=s, drop_last=False),
    "TensorDataset": lambda n, b, s: as_batches(tensors(n), batch_size=b, seed=s, drop_last=False),
    "list of examples": lambda n, b, s: as_batches(list(rows(n)), batch_size=b, seed=s, drop_last=False),
    "Hugging Face": lambda n, b, s: as_batches(table(n), batch_size=b, seed=s, drop_last=False),
    "Hugging Face transform": lambda n, b, s: as_batches(noisy_table(n), batch_size=b, seed=s, drop_last=False),
    "Hugging Face stream": lambda n, b, s: as_batches(
        stream(n).shuffle(seed=1, buffer_size=4), batch_size=b, seed=s, drop_last=False
    ),
    "torch stream": lambda n, b, s: as_batches(NoisyStream(n), batch_size=b, seed=s, drop_last=False),
    "loader": lambda n, b, s: as_batches(DataLoader(Noisy(n), b, shuffle=True), seed=s),
    "loader of tensors": lambda n, b, s: as_batches(DataLoader(tensors(n), b, shuffle=True), seed=s),
    "loader with generator": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), b, shuffle=True, generator=torch.Generator().manual_seed(9)), seed=s
    ),
    "loader with sampler": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), b, sampler=SubsetRandomSampler(range(n), torch.Generator())), seed=s
    ),
    "loader with an eager sampler": lambda n, b, s: as_batches(DataLoader(Noisy(n), b, sampler=DrawsAtOnce(n)), seed=s),
    "loader with batch sampler": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), batch_sampler=BatchSampler(RandomSampler(range(n)), b, False)), seed=s
    ),
    "loader of a stream": lambda n, b, s: as_batches(DataLoader(NoisyStream(n), b), seed=s),
    "stateful loader": lambda n, b, s: as_batches(StatefulDataLoader(Noisy(n), b, shuffle=True), seed=s),
    "stateful loader of a stream": lambda n, b, s: as_batches(StatefulDataLoader(StatefulStream(n), b), seed=s),
    "stateful loader of a plain stream": lambda n, b, s: as_batches(StatefulDataLoader(NoisyStream(n), b), seed=s),
    "mapped": lambda n, b, s: mapped(
        as_batches(rows(n), batch_size=b, seed=s, drop_last=False),
        lambda x, g: (x, torch.rand(len(x), generator=g)),
        seed=s,
    ),
    "prefetched": lambda n, b, s: prefetched(as_batches(rows(n), batch_size=b, seed=s, drop_last=False), 3),
}
"""Sources whose epoch covers the examples 0 to n-1, each once."""

OTHERS: dict[str, Make] = {
    "drop last": lambda n, b, s: as_batches(rows(n), batch_size=min(b, n), seed=s),
    "in order": lambda n, b, s: as_batches(rows(n), batch_size=b, seed=s, shuffle=False, drop_last=False),
    "loader with a drawing sampler": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), b, sampler=DrawsAsItGoes(n)), seed=s
    ),
    "loader with weights": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), b, sampler=WeightedRandomSampler([1.0 + i for i in range(n)], n)), seed=s
    ),
    "loader with replacement": lambda n, b, s: as_batches(
        DataLoader(Noisy(n), b, sampler=RandomSampler(range(n), True, n + 40, torch.Generator())), seed=s
    ),
    "loader of a subset": lambda n, b, s: as_batches(
        DataLoader(Subset(Subset(tensors(n + 5), range(3, n + 3)), range(n - 1, -1, -1)), b, shuffle=True), seed=s
    ),
    "loader of whole batches": lambda n, b, s: as_batches(
        DataLoader(WholeBatches(n), batch_size=None, shuffle=True), seed=s
    ),
    "list of batches": lambda n, b, s: as_batches([(x, torch.ones(1)) for x in rows(n).split(b)], seed=s),
    "iterable": lambda n, b, s: as_batches(Shuffling(n), seed=s),
    "function": lambda n, b, s: as_batches(lazily(n), seed=s),
    "stateful iterator": lambda n, b, s: as_batches(StatefulIterator(n), seed=s),
    "text": lambda n, b, s: text_batches(words(n, b), b, 5, s),
}

if StatefulDataLoader is None:
    EXAMPLES = {kind: make for kind, make in EXAMPLES.items() if not kind.startswith("stateful loader")}
ALL = EXAMPLES | OTHERS
