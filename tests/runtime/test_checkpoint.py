"""Checkpoints hold a whole state, whatever happens to the process, the disk or a bit of a file."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import millrace.errors
from millrace.errors import CheckpointError, DamagedCheckpointError, SettingError
from millrace.runtime.checkpoint import Checkpoints
from millrace.runtime.commit import Digest
from millrace.runtime.manifest import FORMAT_VERSION, Manifest, decode_manifest, encode_manifest
from millrace.runtime.shard import read_shard, read_shard_into, write_shard

FILES = ["variables.safetensors", "extra.json", "manifest.json"]
SAVER = Path(__file__).with_name("saver_to_kill.py")


def state(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((5, 3), float(step)), "n": torch.tensor(step), "b": torch.full((2,), step).bfloat16()}


def run_saver(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    source = str(Path(millrace.errors.__file__).parents[1])
    command = [*before, sys.executable, str(SAVER), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": source}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def outcome(*arguments: object, before: tuple[str, ...] = ()) -> Any:
    return json.loads(run_saver(*arguments, before=before).stdout)


class Gate:
    """A disk that takes what is written only when it is told to."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        self.begun.set()
        assert self.open.wait(20)
        return write_shard(path, tensors)


def same_state(tensors: dict[str, Tensor], step: int) -> bool:
    wanted = state(step)
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


# what goes in comes out


def test_everything_comes_back(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "epoch": 2,
        "seen": [1, 2.5, None],
        "pair": (1, 2),
        "text": "ü\n",
        "inf": math.inf,
        "no": {},
    }
    with Checkpoints(tmp_path / "deep" / "run") as checkpoints:
        checkpoints.save(7, state(7), extra, metric=0.25)
        checkpoints.save(123456789, state(8))
    again = Checkpoints(tmp_path / "deep" / "run")
    assert again.steps() == [7, 123456789]
    found = again.load(7)
    assert same_state(found.tensors, 7)
    assert (found.step, found.metric, found.extra) == (7, 0.25, {**extra, "pair": [1, 2]})
    assert found.path == tmp_path / "deep" / "run" / "step-00000007"
    newest = again.load()
    assert same_state(newest.tensors, 8)
    assert (newest.step, newest.metric, newest.extra) == (123456789, None, {})


def test_a_checkpoint_is_three_plain_files_and_the_manifest_vouches_for_them(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(3, state(3), {"a": 1}, metric=math.nan, wait=True)
    path = tmp_path / "step-00000003"
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    assert json.loads((path / "extra.json").read_text()) == {"a": 1}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["step"] == 3
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: (path / name).stat().st_size for name in FILES[:2]
    }
    assert Checkpoints(tmp_path).best() is None  # NaN is no metric
    metric = Checkpoints(tmp_path).load().metric
    assert metric is not None
    assert math.isnan(metric)


def test_looking_for_checkpoints_creates_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "typo")
    assert checkpoints.steps() == []
    assert checkpoints.best() is None
    with pytest.raises(CheckpointError, match="typo has no checkpoint"):
        checkpoints.load()
    assert not (tmp_path / "typo").exists()


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2), wait=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3\. There are: 1, 2\."):
        checkpoints.load(3)


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"a": {"b": [1, torch.ones(2)]}}, r"extra\['a'\]\['b'\]\[1\] is a Tensor"),
        ({"a": {3: "x"}}, r"extra\['a'\] has the key 3"),
        ({"a": {1, 2}}, r"extra\['a'\] is a set"),
    ],
)
def test_what_json_does_not_hold_is_refused_at_once(tmp_path: Path, extra: Any, where: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=where):
        checkpoints.save(1, state(1), extra)
    with pytest.raises(CheckpointError, match=r"'s'.*to_dense"):
        checkpoints.save(1, {"s": torch.eye(2).to_sparse()})
    with pytest.raises(CheckpointError, match="counted from 0"):
        checkpoints.save(-1, state(1))
    assert checkpoints.steps() == []


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_best": -1}, {"best": "low"}])
def test_settings_that_keep_nothing_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="keep_last ≥ 1"):
        Checkpoints(tmp_path, **wrong)


# training goes on


def test_training_goes_on_and_does_not_leak_into_the_file(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, write=gate.write)
    tensors, extra = state(1), {"losses": [1.0]}
    checkpoints.save(1, tensors, extra)
    assert gate.begun.wait(20)  # the writer is at work, and save has returned
    for tensor in tensors.values():
        tensor.add_(100)
    extra["losses"].append(2.0)
    tensors.clear()
    assert checkpoints.steps() == []
    gate.open.set()
    found = checkpoints.load()  # waits for the writer
    assert same_state(found.tensors, 1)
    assert found.extra == {"losses": [1.0]}


def test_the_second_save_waits_for_the_first(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, write=gate.write)
    checkpoints.save(1, state(1))
    second = threading.Thread(target=checkpoints.save, args=(2, state(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert checkpoints.steps() == []
    gate.open.set()
    second.join(20)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_a_program_that_ends_finishes_its_last_checkpoint_or_says_that_it_failed(tmp_path: Path) -> None:
    told = run_saver("leave", tmp_path).stderr
    assert f"The last checkpoint of {tmp_path / 'bad'} was not saved" in told
    assert "Input/output error" in told
    assert Checkpoints(tmp_path).load().step == 5


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("odd"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("through", ["save", "wait", "close", "with", "save and wait"])
def test_an_error_of_the_writer_surfaces_once_and_costs_nothing_else(
    tmp_path: Path, error: BaseException, through: str
) -> None:
    failing = {2}

    def write(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        digest = write_shard(path, tensors)
        if int(tensors["n"]) in failing:
            raise error
        return digest

    checkpoints = Checkpoints(tmp_path, write=write)
    checkpoints.save(1, state(1), wait=True)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:  # noqa: PT012 (what raises is what varies)
        if through == "save and wait":
            checkpoints.save(2, state(2), wait=True)
        checkpoints.save(2, state(2))
        if through == "save":
            checkpoints.save(3, state(3))
        elif through == "with":
            with checkpoints:
                pass
        else:
            getattr(checkpoints, through)()
    if isinstance(error, OSError):
        assert "step-00000002 could not be written: Input/output error" in str(pickle.loads(pickle.dumps(caught.value)))
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert checkpoints.load().step == 1
    checkpoints.wait()
    failing.clear()
    checkpoints.save(3, state(3), wait=True)
    assert checkpoints.steps() == [1, 3]


# whole at every moment


@pytest.mark.long
def test_kill_9_at_random_moments_never_costs_a_promised_checkpoint(tmp_path: Path) -> None:
    result = outcome("random", tmp_path / "run", 25, 20261120)
    assert result["kills"] == 25
    assert result["torn"] >= 3  # enough of them came in the middle of a save
    assert Checkpoints(tmp_path / "run").load().step == result["newest"] > 0


def test_kill_9_before_every_single_request_to_the_file_system(tmp_path: Path) -> None:
    result = outcome("points", tmp_path / "run")
    assert result["points"] >= 20
    assert result["outcomes"] == 3  # the old version, the new one, the next step


def test_all_is_synced_in_the_order_that_a_power_cut_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        for path in [tmp_path, *tmp_path.rglob("*")]:
            names[path.stat().st_ino] = path.name.split(".tmp")[0]
        order.append(("sync", names[inode]))
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **options: Any) -> None:
        order.append(("rename", Path(target).name))
        real_rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    Checkpoints(tmp_path).save(1, state(1), wait=True)
    assert order == [
        *[("sync", name) for name in FILES],
        ("sync", "step-00000001"),
        ("rename", "step-00000001"),
        ("sync", tmp_path.name),
    ]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for value in (1, 2):
        checkpoints.save(9, state(value), {"value": value}, wait=True)
    found = checkpoints.load()
    assert same_state(found.tensors, 2)
    assert found.extra == {"value": 2}
    assert os.listdir(tmp_path) == ["step-00000009"]


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(9, state(1), wait=True)
    real_rename = os.rename

    def rename(source: Any, target: Any) -> None:
        if ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(9, state(2), wait=True)
    assert os.listdir(tmp_path) == ["step-00000009"]
    assert same_state(checkpoints.load().tensors, 1)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, state(1), wait=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        with subprocess.Popen(["true"]) as dead:
            dead.wait()
        kept = [f"step-00000002.tmp-{living.pid}-00aa", f"step-00000003.old-{living.pid}", "notes.tmp-5", "step-7.tmp"]
        gone = [
            f"step-00000002.tmp-{dead.pid}",
            f"step-00000001.old-{dead.pid}-00bb",
            f"step-00000004.tmp-{os.getpid()}-0",
        ]
        for name in kept + gone:
            shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
        # its successor never arrived
        shutil.copytree(tmp_path / "step-00000001", tmp_path / f"step-00000000.old-{dead.pid}-00cc")
        checkpoints = Checkpoints(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(["step-00000000", "step-00000001", *kept])
        assert checkpoints.steps() == [0, 1]
        living.communicate(b"\n")


def test_a_save_under_way_survives_a_second_look_at_its_directory(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, write=gate.write)
    checkpoints.save(1, state(1))
    assert gate.begun.wait(20)
    assert Checkpoints(tmp_path).steps() == []
    gate.open.set()
    checkpoints.wait()
    assert Checkpoints(tmp_path).load().step == 1


def in_a_small_disk(directory: Path) -> tuple[str, ...]:
    """What to put before a command for it to see a disk of 1 MB there, alone in a mount namespace of its own."""
    return ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(directory))


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        try:
            return subprocess.run([*in_a_small_disk(Path(directory)), "true"], capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


@pytest.mark.parametrize("how", ["disk", pytest.param("limit", marks=pytest.mark.long)])
def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(tmp_path: Path, how: str) -> None:
    if how == "disk" and not can_mount():
        pytest.skip("mounting a small disk needs root; the limit on the file size stands in for it")
    if how == "disk":
        message = outcome("full", tmp_path, 0, before=in_a_small_disk(tmp_path))["message"]
        free_bytes = int(message.split(" bytes; ")[1].split(" bytes are free")[0].replace(",", ""))
        assert "No space left on device" in message
        assert 0 < free_bytes < 1 << 20
    else:
        message = outcome("full", tmp_path, 1_000_000)["message"]
        assert "ulimit -f" in message
    assert str(tmp_path / "step-00000002") in message
    needed_bytes = int(message.split("It needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 4_000_000 < needed_bytes < 4_100_000
    assert "Free some space" in message


# damage


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, float, int]:
    kind = draw(st.sampled_from(["flip", "cut", "grow", "gone"]))
    return draw(st.sampled_from(FILES)), kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))


def do_damage(path: Path, kind: str, place: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if kind == "gone":
        path.unlink()
        return
    if kind == "flip":
        content[at] ^= 1 << bit
    elif kind == "cut":
        del content[at:]
    else:
        content += b" " * (bit + 1)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state(1), {"a": [1, "x"]}, metric=0.5)
        checkpoints.save(2, state(2), {"a": [2, "y"]}, metric=0.25)
    return directory


@given(damage=damages())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_named_and_the_one_before_is_used(two_saved: Path, damage: tuple[str, str, float, int]) -> None:
    name, kind, place, bit = damage
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "run"
        shutil.copytree(two_saved, directory)
        damaged = directory / "step-00000002" / name
        do_damage(damaged, kind, place, bit)
        checkpoints = Checkpoints(directory)
        with pytest.warns(UserWarning, match="step 1 is used instead") as told:
            found = checkpoints.load()
        assert len(told) == 1
        assert str(damaged) in str(told[0].message)
        assert found.step == 1
        assert same_state(found.tensors, 1)
        assert found.extra == {"a": [1, "x"]}
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpoints.load(2)
        assert str(damaged) in str(caught.value)


def test_every_bit_of_the_manifest_counts(two_saved: Path) -> None:
    path = two_saved / "step-00000002" / "manifest.json"
    whole = path.read_bytes()
    assert decode_manifest(path, whole).metric == 0.25
    for at in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
                decode_manifest(path, bytes(content))
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
            decode_manifest(path, whole[:at])


def test_no_good_one_left_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
    (tmp_path / "step-00000001" / "extra.json").write_text("{}")
    (tmp_path / "step-00000002" / "variables.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="no good checkpoint") as caught:
            checkpoints.load()
    assert "step-00000001/extra.json is truncated" in str(caught.value)
    assert "step-00000002/variables.safetensors cannot be read" in str(caught.value)


def test_a_run_goes_on_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(4, state(4), wait=True)
    do_damage(tmp_path / "step-00000004" / "variables.safetensors", "flip", 0.9, 3)
    checkpoints.save(3, state(3), wait=True)  # the run went back, and does not lose what it saves now
    with pytest.warns(UserWarning, match="step 3 is used instead"):
        assert checkpoints.load().step == 3
    checkpoints.save(4, state(4), wait=True)
    assert same_state(checkpoints.load(4).tensors, 4)


def test_a_later_format_and_a_renamed_folder_are_told_apart_from_damage(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, state(1), wait=True)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    whole = manifest.read_bytes()
    later = encode_manifest(Manifest(1, None, {}), format_version=99)
    manifest.write_bytes(later)
    with pytest.raises(CheckpointError, match=r"format version 99.*Use the version of millrace"):
        Checkpoints(tmp_path).load()
    manifest.write_bytes(whole)
    os.rename(tmp_path / "step-00000001", tmp_path / "step-00000002")
    with pytest.raises(DamagedCheckpointError, match="folder was renamed"):
        Checkpoints(tmp_path).load(2)


def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"mine": torch.ones(2)})
        checkpoints.save(2, {"other": torch.ones(3)})
    mine = {"mine": torch.zeros(2)}

    def read(path: Path, expected: Digest | None) -> dict[str, Tensor]:
        read_shard_into(path, expected, mine)
        return mine

    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        Checkpoints(tmp_path, read=read).load()
    assert not mine["mine"].any()
    Checkpoints(tmp_path, read=read).load(1)
    assert mine["mine"].all()


def test_reader_and_writer_are_the_caller_s(tmp_path: Path) -> None:
    """As when they are nodes of a graph: here, one that keeps everything negated in the file."""

    def write(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        return write_shard(path, {name: -tensor for name, tensor in tensors.items()})

    def read(path: Path, expected: Digest | None) -> dict[str, Tensor]:
        return {name: -tensor for name, tensor in read_shard(path, expected).items()}

    with Checkpoints(tmp_path, write=write, read=read) as checkpoints:
        checkpoints.save(3, state(3))
    assert same_state(checkpoints.load().tensors, 3)
    assert Checkpoints(tmp_path).load().tensors["n"] == -3


# which ones stay

METRICS = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3).map(float), st.just(math.inf))


@given(
    saves=st.lists(st.tuples(st.integers(0, 9), METRICS), min_size=1, max_size=9),
    keep_last=st.integers(1, 3),
    keep_best=st.integers(0, 2),
    best=st.sampled_from(["min", "max"]),
)
@settings(max_examples=25, deadline=None)
def test_the_last_and_the_best_stay_and_nothing_else(
    saves: list[tuple[int, float | None]], keep_last: int, keep_best: int, best: Any
) -> None:
    present: dict[int, float] = {}
    sign = 1 if best == "min" else -1

    def stays(step: int, saved: int) -> bool:
        newer = sum(other > step for other in present)
        better = sum((present[other], other) < (present[step], step) for other in present)
        is_best = not math.isnan(present[step]) and better < keep_best
        return step == saved or newer < keep_last or is_best

    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory), keep_last=keep_last, keep_best=keep_best, best=best)
        for step, metric in saves:
            checkpoints.save(step, {"step": torch.tensor(step)}, metric=metric, wait=True)
            present[step] = math.nan if metric is None else sign * metric
            present = {other: value for other, value in present.items() if stays(other, step)}
            assert sorted(os.listdir(directory)) == [f"step-{other:08d}" for other in sorted(present)]
            judged = [(value, other) for other, value in present.items() if not math.isnan(value)]
            assert checkpoints.best() == (min(judged)[1] if judged else None)
        for step in present:
            assert checkpoints.load(step).tensors["step"] == step


def test_a_run_that_goes_back_forgets_its_old_future(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state(step))
        checkpoints.rewind(2)
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.load().step == 2
