"""Weights under the module's own names, for this program and any other that reads safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from millrace.errors import CheckpointError, DamagedCheckpointError
from millrace.runtime.weights import load_weights, save_weights


class Tied(nn.Module):
    """A little language model whose output layer is its embedding, with a buffer and a shared submodule."""

    def __init__(self, seed: int, *, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 7, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_else", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.first(self.norm(self.embed(x)))))


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model, other = Tied(0), Tied(1)
    model.norm.num_batches_tracked.add_(5)
    path = tmp_path / "new" / "w.safetensors"
    save_weights(model, path)
    plain = safetensors.torch.load_file(path)
    assert set(model.state_dict()) - set(plain) == {"head.weight", "again.weight", "again.bias"}
    assert load_weights(other, path) == ([], [])
    assert equal(other, model)
    assert other.head.weight is other.embed.weight
    x = torch.arange(7)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_the_library_s_own_tied_files_go_both_ways(tmp_path: Path) -> None:
    model = Tied(0)
    save_weights(model, tmp_path / "ours")
    theirs = Tied(1)
    safetensors.torch.load_model(theirs, tmp_path / "ours")
    assert equal(theirs, model)
    safetensors.torch.save_model(model, str(tmp_path / "theirs"))
    ours = Tied(2)
    load_weights(ours, tmp_path / "theirs")
    assert equal(ours, model)


def test_a_tied_file_fills_a_module_that_does_not_tie(tmp_path: Path) -> None:
    save_weights(Tied(0), tmp_path / "w")
    untied = Tied(1, tie=False)
    load_weights(untied, tmp_path / "w")
    assert equal(untied, Tied(0))
    assert untied.head.weight is not untied.embed.weight


def test_an_untied_file_fits_a_tied_module_only_where_its_values_agree(tmp_path: Path) -> None:
    untied = Tied(0, tie=False)
    save_weights(untied, tmp_path / "w")
    tied = Tied(1)
    with pytest.raises(CheckpointError, match=r"different values for 'embed\.weight' and 'head\.weight'"):
        load_weights(tied, tmp_path / "w")
    assert equal(tied, Tied(1))
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    save_weights(untied, tmp_path / "w")
    load_weights(tied, tmp_path / "w")
    assert equal(tied, untied)


def test_parts_of_one_storage_are_no_ties(tmp_path: Path) -> None:
    model = nn.Module()
    base = torch.arange(12.0)
    model.register_buffer("whole", base)
    model.register_buffer("part", base[3:6])
    model.register_buffer("turned", base.view(3, 4).t())
    save_weights(model, tmp_path / "w")
    plain = safetensors.torch.load_file(tmp_path / "w")
    assert {name: tensor.tolist() for name, tensor in plain.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }


def test_the_metadata_names_the_ties_and_the_framework(tmp_path: Path) -> None:
    save_weights(Tied(0), tmp_path / "w")
    with safetensors.safe_open(tmp_path / "w", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",  # without it some readers refuse the file
            "head.weight": "embed.weight",
            "again.weight": "first.weight",
            "again.bias": "first.bias",
        }


def test_in_place_and_into_the_module_s_own_dtype(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_weights(model, tmp_path / "w")
    half = nn.Linear(3, 2).bfloat16()
    kept = half.weight.data_ptr()
    load_weights(half, tmp_path / "w")
    assert half.weight.data_ptr() == kept
    assert torch.equal(half.weight, model.weight.bfloat16())
    assert half.weight.requires_grad


def test_the_file_before_stays_whole_when_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Tied(0), path)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*No space left.*bytes are free.*Free some space"):
        save_weights(Tied(1), path)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    again = Tied(2)
    load_weights(again, path)
    assert equal(again, Tied(0))


def test_extra_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(CheckpointError, match=r"_extra_state.*dict"):
        save_weights(Odd(2, 2), tmp_path / "w")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "a.b."])
def test_a_wrapper_s_prefix_is_recognised_on_either_side(tmp_path: Path, prefix: str) -> None:
    inner = Tied(0)
    wrapped: nn.Module = inner
    for part in reversed(prefix.rstrip(".").split(".")):
        wrapped = nn.ModuleDict({part: wrapped})
    save_weights(wrapped, tmp_path / "wrapped")
    save_weights(inner, tmp_path / "inner")
    target = Tied(1)
    with pytest.raises(CheckpointError) as in_file:
        load_weights(target, tmp_path / "wrapped")
    assert f"prefix={prefix!r}" in str(in_file.value)
    assert equal(target, Tied(1))
    load_weights(target, tmp_path / "wrapped", prefix=prefix)
    assert equal(target, inner)
    with pytest.raises(CheckpointError) as in_module:
        load_weights(wrapped, tmp_path / "inner")
    assert f"load_weights(module.{prefix[:-1]}, path)" in str(in_module.value)


def test_names_that_differ_a_little_get_a_suggestion(tmp_path: Path) -> None:
    save_weights(nn.ModuleDict({"encoder": nn.Linear(2, 2)}), tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"Did you mean 'encoder\.bias'"):
        load_weights(nn.ModuleDict({"encodr": nn.Linear(2, 2)}), tmp_path / "w")


def test_what_one_side_lacks(tmp_path: Path) -> None:
    save_weights(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), tmp_path / "w")
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2, bias=False)})
    with pytest.raises(CheckpointError, match=r"'c\.weight'") as caught:
        load_weights(target, tmp_path / "w")
    assert "'b.weight'" in str(caught.value)
    assert load_weights(target, tmp_path / "w", strict=False) == (["c.weight"], ["b.bias", "b.weight"])
    assert torch.equal(target["a"].weight, safetensors.torch.load_file(tmp_path / "w")["a.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_and_kinds_never_load(tmp_path: Path, strict: bool) -> None:
    save_weights(nn.ModuleDict({"a": nn.Linear(2, 3), "n": nn.BatchNorm1d(2)}), tmp_path / "w")
    target = nn.ModuleDict({"a": nn.Linear(2, 4), "n": nn.BatchNorm1d(2)})
    target["n"].num_batches_tracked = target["n"].num_batches_tracked.float()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="sizes and dtypes") as caught:
        load_weights(target, tmp_path / "w", strict=strict)
    for part in ("'a.weight' is [3, 2] in the file, [4, 2] in the module", "int64 in the file", "Nothing was changed"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_module_without_memory_says_how_to_get_some(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 2), tmp_path / "w")
    with pytest.raises(CheckpointError, match="to_empty"):
        load_weights(nn.Linear(2, 2, device="meta"), tmp_path / "w")


def test_files_of_another_kind(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"torch\.save.*save_weights"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    (tmp_path / "text").write_text("hello, this is no tensor file")
    with pytest.raises(DamagedCheckpointError, match="text is no whole safetensors file"):
        load_weights(nn.Linear(2, 2), tmp_path / "text")
    with pytest.raises(DamagedCheckpointError, match="missing cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path / "missing")
