"""Randomness that follows from names, and reading under a seed without touching the user's global random state.

Code that reads data (data sets, samplers, transforms) draws from Python's, numpy's and torch's global generators as it
likes. To make its draws repeatable, each batch is read with these three seeded from (seed, epoch, number), and their
former states are put back afterwards. Generators that an object holds as its own attributes are seeded likewise.
Only the CPU generator of torch is treated so.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on every part and is the same in every process and version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_from(*parts: int | str) -> torch.Generator:
    """A new CPU generator seeded with `derived_seed(*parts)`."""
    generator = torch.Generator()
    generator.manual_seed(derived_seed(*parts))
    return generator


def seed_global_random(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU only, unlike torch.manual_seed)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the legacy state is the point: users' code draws from it)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def global_random_kept() -> Iterator[None]:
    """Put the global random states back as they were when the block ends, however it ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def seeded_global_random(seed: int) -> Iterator[None]:
    """Seed the global generators for the block, and put them back afterwards."""
    with global_random_kept():
        seed_global_random(seed)
        yield


def own_generators(owner: object) -> dict[str, Generator]:
    """The random generators that an object holds as its attributes, by name."""
    attributes = getattr(owner, "__dict__", {})
    return {name: value for name, value in attributes.items() if isinstance(value, Generator)}


def reseed_own_generators(owner: object, seed: int) -> None:
    """Seed every generator that `owner` holds; objects without any stay untouched."""
    for name, generator in own_generators(owner).items():
        own_seed = derived_seed(seed, name)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own_seed)
        elif isinstance(generator, random.Random):
            generator.seed(own_seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own_seed).state
        else:
            generator.seed(own_seed % 2**32)


@contextlib.contextmanager
def own_generators_kept(owners: Iterable[object]) -> Iterator[None]:
    """Put the generators that these objects hold back as they were when the block ends."""
    kept = [(generator, _state(generator)) for owner in owners for generator in own_generators(owner).values()]
    try:
        yield
    finally:
        for generator, state in kept:
            _set_state(generator, state)


def _state(generator: Generator) -> object:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def _set_state(generator: Generator, state: object) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)  # type: ignore[arg-type]
    elif isinstance(generator, random.Random):
        generator.setstate(state)  # type: ignore[arg-type]
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state  # type: ignore[assignment]
    else:
        generator.set_state(state)  # type: ignore[arg-type]


def follow_epoch(owners: Iterable[object], epoch: int, seed: int) -> None:
    """Tell objects which epoch begins: `set_epoch` where they have it, and new seeds for their own generators."""
    for place, owner in enumerate(owners):
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        reseed_own_generators(owner, derived_seed(seed, epoch, place))
