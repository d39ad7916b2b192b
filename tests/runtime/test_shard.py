"""One file of tensors: what goes in comes out bit for bit, and a damaged file never does."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.errors import CheckpointError, DamagedCheckpointError
from millrace.runtime.shard import _DTYPES, read_shard, read_shard_into, snapshot, write_shard

DTYPES = sorted(_DTYPES.values(), key=str)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of arbitrary bits (0 or 1 for bool), so NaNs and denormals are among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype is torch.bool else 256
    return torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    def shown(tensors: dict[str, Tensor]) -> dict[str, object]:
        return {name: (tensor.dtype, tensor.shape, bits(tensor)) for name, tensor in tensors.items()}

    return shown(found) == shown(wanted)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of all dtypes and odd shapes, contiguous or not, some of them views of each other."""
    tensors: dict[str, Tensor] = {}
    for index in range(draw(st.integers(0, 5))):
        name = draw(st.text(st.characters(codec="utf-8"), min_size=0, max_size=8)) + f".{index}"
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        tensor = noise(shape, draw(st.sampled_from(DTYPES)), seed=index)
        view = draw(st.sampled_from(["whole", "transposed", "strided", "expanded", "tied"]))
        if view == "transposed" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif view == "strided" and tensor.dim():
            tensor = tensor[::2]
        elif view == "expanded":
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
        elif view == "tied":
            tensors[name + ".tied"] = tensor
        tensors[name] = tensor
    return tensors


@given(tensors=tensor_dicts())
@example({"one": torch.ones(1, dtype=torch.bfloat16)[::2], "none": torch.empty(0, dtype=torch.float64)[::2]})
@settings(max_examples=80, deadline=None)
def test_every_tensor_comes_back_bit_for_bit_here_and_in_the_library(tensors: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        digest = write_shard(path, tensors)
        content = path.read_bytes()
        assert (digest.sha256, digest.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        assert same(read_shard(path, digest), tensors)
        assert same(safetensors.torch.load_file(path), tensors)
        assert same(snapshot(tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_starts_at_a_multiple_of_its_size(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"odd": noise((3,), torch.uint8, 0), "it": noise((5, 2), dtype, 1), "scalar": noise((), dtype, 2)}
    digest = write_shard(tmp_path / "a", tensors)
    assert same(read_shard(tmp_path / "a", digest), tensors)
    header = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert header % 8 == 0
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        assert file.get_tensor("it").data_ptr() % dtype.itemsize == 0


def test_pending_conjugation_is_written_as_its_value(tmp_path: Path) -> None:
    conjugate = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    digest = write_shard(tmp_path / "a", {"c": conjugate, "i": conjugate.imag})
    read = read_shard(tmp_path / "a", digest)
    assert torch.equal(read["c"], torch.tensor([1 - 2j, 3 + 4j], dtype=torch.complex64))
    assert torch.equal(read["i"], torch.tensor([-2.0, 4.0]))


def test_more_than_one_chunk(tmp_path: Path) -> None:
    tensors = {"large": noise((1_300_000,), torch.float64, 0), "small": noise((3,), torch.bool, 1)}
    digest = write_shard(tmp_path / "a", tensors)
    assert digest.size_bytes > 2 * (4 << 20)
    assert digest.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert same(read_shard(tmp_path / "a", digest), tensors)


def test_the_file_is_synced_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size)))
    digest = write_shard(tmp_path / "a", {"w": torch.zeros(9)})
    assert synced == [((tmp_path / "a").stat().st_ino, digest.size_bytes)]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("w", torch.eye(2).to_sparse(), "to_dense"),
        ("w", torch.zeros(2, dtype=torch.complex128), "complex128"),
        ("w", torch.zeros(2, device="meta"), "meta"),
        ("w", [1.0], "list"),
        ("__metadata__", torch.zeros(2), "Rename"),
    ],
    ids=["sparse", "complex128", "meta", "list", "name"],
)
def test_what_no_file_can_hold_is_refused_by_name(tmp_path: Path, name: str, value: Tensor, says: str) -> None:
    for refuse in (lambda: write_shard(tmp_path / "a", {name: value}), lambda: snapshot({name: value})):
        with pytest.raises(CheckpointError, match=says) as caught:
            refuse()
        assert repr(name) in str(caught.value)
    assert not (tmp_path / "a").exists()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_flipped_bit_and_any_cut_is_found_and_named(place: float, bit: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        digest = write_shard(path, {"w": noise((7, 3), torch.float32, 0), "b": noise((3,), torch.int64, 1)})
        content = bytearray(path.read_bytes())
        at = int(place * len(content))
        if cut:
            del content[at:]
        else:
            content[at] ^= 1 << bit
        path.write_bytes(content)
        target = torch.ones(7, 3)
        with pytest.raises(DamagedCheckpointError, match=r"a\.safetensors.*(truncated|altered)"):
            read_shard(path, digest)
        with pytest.raises(DamagedCheckpointError, match=r"a\.safetensors"):
            read_shard_into(path, digest, {"w": target, "b": torch.ones(3, dtype=torch.int64)})
        assert torch.equal(target, torch.ones(7, 3))
        if cut:  # which even the format alone gives away
            with pytest.raises(DamagedCheckpointError, match=r"a\.safetensors"):
                read_shard(path, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    digest = write_shard(tmp_path / "a", {})
    for expected in (digest, None):
        with pytest.raises(DamagedCheckpointError, match=r"gone.*No such file"):
            read_shard(tmp_path / "gone", expected)


def test_read_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    digest = write_shard(tmp_path / "a", {"w": torch.ones(4), "v": torch.ones(4)})
    first = read_shard(tmp_path / "a", digest)
    first["w"].add_(1)
    assert torch.equal(first["v"], torch.ones(4))
    assert first["w"].untyped_storage().nbytes() == 16
    assert torch.equal(read_shard(tmp_path / "a", digest)["w"], torch.ones(4))


def test_read_into_fills_the_memory_that_is_there(tmp_path: Path) -> None:
    wanted = {"w": noise((4, 3), torch.float32, 0).nan_to_num(), "n": torch.tensor(7), "e": torch.zeros(0, 2)}
    digest = write_shard(tmp_path / "a", wanted)
    parameter = torch.nn.Parameter(torch.zeros(3, 4)).t()  # not contiguous, and part of a graph
    targets = {"w": parameter, "n": torch.tensor(0), "e": torch.zeros(0, 2)}
    pointers = {name: target.data_ptr() for name, target in targets.items()}
    read_shard_into(tmp_path / "a", digest, targets)
    assert same(targets, wanted)
    assert {name: target.data_ptr() for name, target in targets.items()} == pointers


def test_a_file_of_another_model_changes_nothing_and_says_all_that_differs(tmp_path: Path) -> None:
    saved = {"a": torch.ones(2, 3), "b": torch.ones(2), "only.saved": torch.ones(1), "same": torch.ones(5)}
    digest = write_shard(tmp_path / "s", saved)
    targets = {
        "a": torch.zeros(3, 3),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "only.here": torch.zeros(1),
        "same": torch.zeros(5),
    }
    with pytest.raises(CheckpointError, match="checkpoint of another model") as caught:
        read_shard_into(tmp_path / "s", digest, targets)
    assert not isinstance(caught.value, DamagedCheckpointError)
    message = str(pickle.loads(pickle.dumps(caught.value)))
    for part in ("'only.here'", "'only.saved'", "F32 [2, 3]", "F32 [3, 3]", "BF16 [2]", "Resume with the model"):
        assert part in message
    assert "'same'" not in message
    assert all(not target.any() for target in targets.values())


def test_a_long_list_of_differences_stays_readable(tmp_path: Path) -> None:
    digest = write_shard(tmp_path / "s", {f"layer.{i}": torch.ones(2) for i in range(50)})
    with pytest.raises(CheckpointError, match="44 more") as missing:
        read_shard_into(tmp_path / "s", digest, {})
    with pytest.raises(CheckpointError, match="42 more") as shapes:
        read_shard_into(tmp_path / "s", digest, {f"layer.{i}": torch.ones(3) for i in range(50)})
    assert max(len(str(missing.value)), len(str(shapes.value))) < 1500


def test_a_snapshot_is_untouched_by_what_follows() -> None:
    base = torch.zeros(4, 4, requires_grad=True)
    view = base.detach()[1]
    copies = snapshot({"base": base, "view": view})
    with torch.no_grad():
        base.add_(1)
    assert not copies["base"].any()
    assert not copies["view"].any()
    assert not copies["base"].requires_grad
    assert copies["view"].untyped_storage().nbytes() == 16
