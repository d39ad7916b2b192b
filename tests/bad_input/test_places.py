"""Bad folders of pictures, foreign checkpoints, full disks, shared run directories and wrong settings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.small import SOURCE, child_environment, copied, cross_entropy, differing, labelled, mlp, run_program
from torch import nn

from millrace import Checkpoints, Model, RunDirectory, Session, fit, load_weights, save_weights, training_graph
from millrace.cli.main import main
from millrace.errors import CheckpointError, DataError, RunDirectoryError

QUIET: dict[str, Any] = {"compile": "eager", "progress": False}
DATA = labelled(32)


def trained(directory: Path, model: nn.Module | None = None, **settings: Any) -> Any:
    model = model or mlp()
    return fit(model, DATA, loss=cross_entropy, optimizer=torch.optim.Adam(model.parameters()), batch_size=8,
               run_dir=directory, **{**QUIET, "epochs": 2, **settings})  # fmt: skip


# -- folders of pictures -------------------------------------------------------------------------------------------


def pictures(directory: Path, labels: list[str], count: int = 5) -> Path:
    for label in labels:
        (directory / label).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (6, 6), 40 * number).save(directory / label / f"{number}.png")
    return directory


def read(directory: Path) -> Any:
    return Model().image_input(directory, rows=6, cols=6)


def test_a_directory_without_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("meow")
    with pytest.raises(DataError, match=r"has no images and none in subfolders, but must hold .*<label>/\*\.png"):
        read(tmp_path)


def test_images_that_lie_directly_in_the_directory(tmp_path: Path) -> None:
    Image.new("L", (6, 6)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"has 1 images directly in it.*Make one subfolder per label"):
        read(tmp_path)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist. Give a directory with one subfolder per label"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty"])
def test_a_corrupt_image_is_named_and_left_alone(damage: str, tmp_path: Path) -> None:
    pictures(tmp_path, ["cat", "dog"])
    file = tmp_path / "dog" / "3.png"
    whole = file.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "no image": b"GIF would be nice", "empty": b""}[damage]
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"dog/3.png cannot be read .*Delete or replace it, or pass skip_corrupt=True"):
        read(tmp_path)
    assert file.read_bytes() == content


def test_a_directory_with_one_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"All 5 images in .* have the one label 'cat', but telling labels apart needs"):
        read(pictures(tmp_path, ["cat"]))


# -- checkpoints of another model -------------------------------------------------------------------------------------


def wider() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def renamed() -> nn.Module:
    return nn.ModuleDict({"body": mlp()})["body"].append(nn.Identity()).append(nn.Linear(3, 3).double())


@pytest.mark.parametrize(("other", "hint"), [(wider, r"\[9, 4\]"), (renamed, "4.weight")], ids=["shapes", "names"])
def test_a_run_is_not_resumed_with_another_model(other: Any, hint: str, tmp_path: Path) -> None:
    trained(tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-????????")) / "variables.safetensors"
    saved, model = checkpoint.read_bytes(), other()
    weights = copied(dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=hint) as caught:
        trained(tmp_path / "run", model, epochs=3, resume=True)
    assert str(checkpoint.parent) in str(caught.value)
    assert differing(dict(model.state_dict()), weights) == [], "the module in hand is untouched"
    assert checkpoint.read_bytes() == saved, "and so is the checkpoint"
    assert trained(tmp_path / "run", epochs=3, resume=True).steps == 12


def test_a_session_and_a_module_refuse_foreign_files(tmp_path: Path) -> None:
    sessions = [
        Session(training_graph(m, cross_entropy, torch.optim.SGD(m.parameters(), lr=0.1), DATA), compile="eager")
        for m in (mlp(), wider())
    ]
    sessions[0].save(tmp_path / "variables.safetensors")
    before = copied(sessions[1].variables)
    with pytest.raises(CheckpointError, match=r"variables.safetensors"):
        sessions[1].restore(tmp_path / "variables.safetensors")
    assert differing(before, sessions[1].variables) == []
    save_weights(mlp(), tmp_path / "weights.safetensors")
    model = wider()
    weights = copied(dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"0.weight"):
        load_weights(model, tmp_path / "weights.safetensors")
    assert differing(dict(model.state_dict()), weights) == []


# -- a full disk ------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, signal, sys, time, torch, torch.nn.functional as F, millrace
from pathlib import Path
from torch import nn

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
torch.manual_seed(0)
model = nn.Linear(200, 100)
x, y = torch.randn(64, 200), torch.randint(100, (64,))


class Fills(millrace.Callback):
    def on_step(self, run, step, values):
        if step == 10 and "full" in sys.argv:
            deadline_s = time.monotonic() + 60  # what is written in the background has to be there first
            while not Path(sys.argv[1], "checkpoints/step-00000008").exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


result = millrace.fit(
    model, (x, y), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=torch.optim.SGD(model.parameters()),
    batch_size=8, epochs=3, run_dir=Path(sys.argv[1]), resume="resume" in sys.argv, compile="eager", progress=False,
    callbacks=[Fills()],
)
print(result.outcome, result.steps)
"""


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    done = run_program(FULL_DISK, tmp_path / "run", "full", cwd=tmp_path)
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert "CheckpointError" in told
    assert "step-00000016 could not be written: File too large. It needs" in told
    assert "bytes are free" in told
    assert "What was saved before is whole. Free some space, keep fewer checkpoints, or save to another disk." in told
    assert RunDirectory.open(tmp_path / "run").state.status == "failed"
    assert Checkpoints(tmp_path / "run" / "checkpoints").load().step == 8
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))

    again = run_program(FULL_DISK, tmp_path / "run", "resume", cwd=tmp_path)
    assert again.stdout.splitlines()[-1] == "finished 24", again.stderr
    run_program(FULL_DISK, tmp_path / "whole", cwd=tmp_path)
    ends = [load_file(tmp_path / name / "checkpoints/step-00000024/variables.safetensors") for name in ("run", "whole")]
    assert differing(*ends) == []


# -- two runs in one directory ----------------------------------------------------------------------------------------

SHARING = """
import sys, time, torch, torch.nn.functional as F, millrace

model = torch.nn.Linear(4, 3)
x = torch.randn(64, 4)


class Waits(millrace.Callback):
    def on_start(self, run):
        print("running", flush=True)

    def on_step(self, run, step, values):
        if step == 3:
            sys.stdin.readline()


print("ready", flush=True)
sys.stdin.readline()
millrace.fit(
    model, (x, x[:, :3].argmax(1)), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), compile="eager", progress=False,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1), batch_size=8, epochs=2, run_dir=sys.argv[1],
    callbacks=[Waits()],
)
print("finished", flush=True)
"""


def started(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SHARING, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(PYTHONPATH=str(SOURCE)),
        cwd=directory.parent,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def press_enter(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.long
def test_of_two_runs_in_one_directory_one_goes_on_undisturbed(tmp_path: Path) -> None:
    processes = [started(tmp_path / "run"), started(tmp_path / "run")]
    try:
        assert [line(process) for process in processes] == ["ready", "ready"]
        for process in processes:
            press_enter(process)
        first, second = sorted(processes, key=lambda process: line(process) != "running")
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        told = errors.splitlines()[-1]
        assert "RunDirectoryError" in told
        assert f"{tmp_path / 'run'} is in use by a run in process {first.pid}. Wait for that run or end it" in told
        with pytest.raises(RunDirectoryError, match="is in use"):
            trained(tmp_path / "run", resume=True)
        shown, errors = first.communicate("\n", timeout=60)
        assert shown.splitlines()[-1] == "finished", errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    state = RunDirectory.open(tmp_path / "run").state
    assert (state.status, state.step, state.pid) == ("finished", 16, first.pid)
    with pytest.raises(RunDirectoryError, match=r"already holds a run .finished at step 16"):
        trained(tmp_path / "run")


# -- settings of a wrong type ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs=many", r"epochs.*whole number.*many"),
        ("epochs=2.5", r"epochs.*whole number.*2\.5"),
        ("epochs=0", r"epochs.*at least 1.*0"),
        ("seed=", r"seed.*whole number"),
        ("compile=fast", r"compile.*tiered.*fast"),
        ("epohcs=3", r"no setting 'epohcs'. Did you mean 'epochs'"),
        ("epochs", r"key=value, but got 'epochs'"),
    ],
)
def test_a_setting_of_a_wrong_type_is_refused_before_a_run_is_begun(
    assignment: str, message: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "digits", "--set", assignment]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err), shown.err
    assert "Traceback" not in shown.err
    assert list(in_tmp.iterdir()) == []
