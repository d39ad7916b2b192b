"""The command line in this process: help, mistakes, and every command once on a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from millrace.cli.main import COMMANDS, FAILED, INTERRUPTED, OK, TRACEBACK, USAGE, main
from millrace.cli.train import _division, parsed
from millrace.errors import SettingError
from millrace.graph.save import load_graph
from millrace.train.callbacks import Callback
from millrace.train.run_directory import RunDirectory
from millrace.version import __version__
from millrace.zoo import run as zoo_run
from millrace.zoo.digits import Digits
from millrace.zoo.registry import summaries
from millrace.zoo.run import Division, configure, step_graph, train
from millrace.zoo.settings import describe

QUICK = ["--set", "steps=8", "--set", "width=4", "--set", "compile=eager", "--device", "cpu"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of digits."""
    path = tmp_path_factory.mktemp("runs") / "short"
    train(configure("digits", ["steps=8", "width=4", "compile=eager"]), run_dir=path, progress=False, device="cpu")
    return path


def last_json(output: str) -> dict[str, Any]:
    """The last line, as --json promises."""
    value: dict[str, Any] = json.loads(output.splitlines()[-1])
    return value


# ---------------------------------------------------------------------- help


def test_help_teaches(capsys: Captured) -> None:
    assert main(["--help"]) == OK
    out = capsys.readouterr().out
    assert all(f"  {command}" in out for command in COMMANDS)
    assert "millrace train digits" in out
    assert "exit status" in out
    assert main(["-h"]) == main(["help"]) == OK


def test_no_command_is_wrong_usage_and_shows_help(capsys: Captured) -> None:
    assert main([]) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: millrace COMMAND" in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == OK
    out = capsys.readouterr().out
    assert f"millrace {command}" in out.partition("examples:")[2]


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == OK
    assert capsys.readouterr().out == f"millrace {__version__}\n"


def test_tasks_and_their_settings(capsys: Captured) -> None:
    assert main(["tasks"]) == OK
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed and summary in listed for name, summary in summaries().items())
    assert main(["tasks", "digits"]) == OK
    settings = capsys.readouterr().out
    assert all(f"  {each.name}=" in settings and each.help in settings for each in describe(Digits.settings_type))


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian digits", "there is no such command. Did you mean 'train'"),
        ("train digit", "no task 'digit'. Did you mean 'digits'"),
        ("train digits --set epoch=3", "no setting 'epoch'. Did you mean 'epochs'"),
        ("train digits --set epochs=three", "epochs takes a whole number of at least 1 or none, but got 'three'"),
        ("train digits --set epochs=0", "but got 0"),
        ("train digits --set epochs", "key=value"),
        ("train digits --set compile=eger", "Did you mean 'eager'"),
        ("train digits --set epochs=none", "needs an end"),
        ("train digits --device cpuu", "'cpuu' cannot be used"),
        ("train --resume nowhere", "No run is at nowhere"),
        ("train --resume latest", "Train one first"),
        ("eval nowhere", "No run is at nowhere"),
        ("predict nowhere x.png", "No run is at nowhere"),
        ("graph digitz", "Did you mean 'digits'"),
        ("graph digits --out step.png", "Did you mean '.svg'"),
        ("tasks digitz", "Did you mean 'digits'"),
    ],
)
def test_wrong_names_and_values(arguments: str, message: str, in_tmp: Path, capsys: Captured) -> None:
    assert main(arguments.split()) == USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith(f"millrace {arguments.split()[0]}: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (in_tmp / "runs").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "a TASK is needed"),
        ("train --resume x --run-dir y", "--run-dir is for new runs"),
        ("train digits --frobnicate", "unrecognized arguments"),
        ("train digits --cluster local", "say over how many processes, by --replicas N; to have the whole run there"),
        ("train digits --room-within 3", "are for replicas"),
        ("train digits --replicas 2 --microbatches 2", "for several devices: give --devices N\n"),
        ("train digits --wire bfloat16", "give --devices N or --cluster FILE"),
        ("train digits --cluster x.json", "no such cluster file"),
        ("predict run", "required: FILE"),
        ("eval", "required: RUN"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--wire", "bfloat16"], ["--devices", "2", "--on", "0=cpu:1", "--cluster", "local"]])
def test_replicas_with_what_fit_takes_beside_them(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Division] = []

    def stop(*_: object, division: Division, **__: object) -> None:
        asked.append(division)
        raise SettingError("far enough")

    monkeypatch.setattr("millrace.cli.train.train", stop)
    assert main(["train", "digits", "--replicas", "2", *more]) == USAGE
    assert asked[0].replicas == 2
    assert (asked[0].wire, asked[0].devices) == (("bfloat16", None) if "--wire" in more else (None, 2))


def test_an_unexpected_error_is_one_line_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the tracer is out")

    monkeypatch.setattr("millrace.cli.tasks.summaries", broken)
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert main(["tasks"]) == FAILED
    assert capsys.readouterr().err.splitlines() == [
        "millrace tasks: the tracer is out (an unexpected RuntimeError; MILLRACE_TRACEBACK=1 shows where it came from)"
    ]
    monkeypatch.setenv(TRACEBACK, "1")
    assert main(["tasks"]) == FAILED
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_python_that_lacks_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("millrace.cli.tasks.summaries", lacking)
    assert main(["tasks"]) == FAILED
    assert capsys.readouterr().err.startswith(f"millrace tasks: {sys.executable} lacks torch. Install millrace there")


# ---------------------------------------------------------------------- commands


def test_train_ends_with_a_line_of_json(in_tmp: Path, capsys: Captured) -> None:
    assert main(["train", "digits", *QUICK, "--json"]) == OK
    captured = capsys.readouterr()
    values = last_json(captured.out)
    assert {"test_accuracy", "steps", "train_s", "first_step_s", "run_dir"} <= values.keys()
    assert values["steps"] == 8
    assert Path(values["run_dir"]).resolve().parent == in_tmp / "runs"
    assert "test accuracy" in captured.out
    assert "step 8/8" in captured.err
    assert main(["train", "--resume", "latest", "--quiet"]) == OK
    again = capsys.readouterr()
    assert "the run had reached its end before, at step 8" in again.out
    assert again.err == ""
    assert main(["train", "digits", "--resume", "latest", "--set", "steps=11", "--device", "cpu"]) == OK
    assert "3 steps after the first 8 in" in capsys.readouterr().out


def test_a_used_run_directory_is_left_alone(run: Path, capsys: Captured) -> None:
    before = (run / "state.json").read_bytes()
    assert main(["train", "digits", *QUICK, "--run-dir", str(run)]) == FAILED
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "state.json").read_bytes() == before


def test_a_run_in_use_is_left_alone(in_tmp: Path, run: Path, capsys: Captured) -> None:
    RunDirectory.create(Path("runs"), "busy", json.loads((run / "config.json").read_text())).close("interrupted")
    with RunDirectory.create(Path("runs"), "busy", exist="resume"):
        assert main(["train", "--resume", "busy"]) == FAILED
    assert "is in use by a run in process" in capsys.readouterr().err


def test_a_run_of_another_task_is_refused(run: Path, capsys: Captured) -> None:
    assert main(["train", "chars", "--resume", str(run)]) == USAGE
    assert "is a run of 'digits', not of 'chars'" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--set", "width=8"]) == USAGE
    assert "started with width=4" in capsys.readouterr().err


def test_what_fails_after_the_start_says_how_to_go_on(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert main(["train", "digits", *QUICK, "--set", "learning_rate=1e30", "--set", "steps=40"]) == FAILED
    err = capsys.readouterr().err
    assert "to go on from its last checkpoint: millrace resume" in err
    assert "inf" in err or "nan" in err.lower()


def test_a_second_interrupt_says_where_the_run_is(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    class Impatient(Callback):
        def on_step(self, run: object, step: int, values: object) -> None:
            if step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "callbacks", lambda *_: [Impatient()])
    assert main(["train", "digits", *QUICK, "--quiet"]) == INTERRUPTED
    assert "interrupted; the run is saved at step 0. To go on:\n  millrace resume" in capsys.readouterr().err


def test_an_interrupt_before_the_first_step(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo_run, "fit", interrupted)
    assert main(["train", "digits", *QUICK]) == INTERRUPTED
    assert "interrupted before the first step; nothing was trained" in capsys.readouterr().err


def test_eval_tells_what_training_told(run: Path, capsys: Captured) -> None:
    kept = json.loads((run / "result.json").read_text())
    assert main(["eval", str(run), "--json", "--device", "cpu"]) == OK
    values = last_json(capsys.readouterr().out)
    assert values["test_accuracy"] == pytest.approx(kept["test_accuracy"], abs=1e-6)
    assert (values["task"], values["step"], values["run_dir"]) == ("digits", 8, str(run))


def test_predict_does_what_it_can(run: Path, tmp_path: Path, capsys: Captured) -> None:
    good, blank, text = tmp_path / "good.png", tmp_path / "blank.png", tmp_path / "text.png"
    image = Image.new("L", (40, 40), 255)
    ImageDraw.Draw(image).line([(20, 5), (20, 35)], fill=0, width=5)
    image.save(good)
    Image.new("L", (40, 40), 255).save(blank)
    text.write_text("no image")
    missing = tmp_path / "missing.png"
    assert main(["predict", str(run), *map(str, (blank, good, text, missing)), "--json"]) == FAILED
    captured = capsys.readouterr()
    (prediction,) = last_json(captured.out)["predictions"]
    assert prediction["file"] == str(good)
    assert prediction["digit"] in range(10)
    assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert captured.out.startswith(f"{good}: {prediction['digit']} (")
    assert [line.startswith("millrace predict: ") for line in captured.err.splitlines()] == [True] * 3
    assert main(["predict", str(run), str(good)]) == OK


def test_graph_as_text_summary_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert main(["graph", "digits", "--set", "width=4"]) == OK
    text = capsys.readouterr().out
    assert "convolution" in text
    traced = step_graph(configure("digits", ["width=4"]))  # once for all that follows
    monkeypatch.setattr("millrace.cli.graph.step_graph", lambda _: traced)
    assert main(["graph", "digits", "--set", "width=4", "--summary"]) == OK
    assert "block1.convolution" in capsys.readouterr().out
    for name in ("step.txt", "step.svg", "step.dot", "step.safetensors"):
        assert main(["graph", "digits", "--set", "width=4", "--out", str(tmp_path / name)]) == OK
        assert " nodes" in capsys.readouterr().out
    assert (tmp_path / "step.txt").read_text() == text
    assert (tmp_path / "step.svg").read_text().lstrip().startswith("<")
    assert (tmp_path / "step.dot").read_text().startswith("digraph")
    assert str(load_graph(tmp_path / "step.safetensors")) == text.rstrip("\n")
    assert main(["graph", "digits", "--out", str(tmp_path / "none" / "step.svg")]) == FAILED
    assert "Choose another place" in capsys.readouterr().err


def test_a_run_goes_on_over_other_replicas_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ways = {
        "one": ["--replicas", "2", "--update", "hybrid", "--groups", "3"],
        "two": [],
        "three": ["--replicas", "2", "--parameter-servers", "2", "--backup", "1", "--spares", "0"],
    }
    for name, arguments in ways.items():
        RunDirectory.create(Path("runs"), name, {"arguments": arguments}).close("interrupted", 0)
    again = parsed(["--resume", "one", "--replicas", "4"])
    assert (again.update, again.groups) == ("hybrid", 3)
    assert parsed(["--resume", "one", "--replicas", "4", "--update", "async"]).update == "async"
    assert parsed(["--resume", "one"]).update == "sync"  # in one process
    assert parsed(["--resume", "two", "--replicas", "4"]).update == "sync"
    again = parsed(["--resume", "three", "--replicas", "4", "--backup", "2"])
    assert (again.update, again.parameter_servers, again.backup) == ("sync", 2, 2)
    assert (again.spares, _division(again).spares) == (0, 0)
    assert _division(parsed(["digits", "--replicas", "2"])).spares == 1
