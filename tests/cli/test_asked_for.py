"""What a submitted run asks of a cluster is what it will start there."""

from __future__ import annotations

import argparse

import pytest

from millrace.cli.submit import asked_for, main
from millrace.cli.train import parsed
from millrace.zoo.submitted import Asked


@pytest.mark.parametrize(
    ("said", "processes"),
    [
        ("--replicas 2", 3),
        ("--replicas 2 --spares 0", 2),
        ("--replicas 2 --backup 1 --parameter-servers 2", 8),  # a copy of each server
        ("--replicas 2 --update async --parameter-servers 4", 11),
        ("--replicas 2 --update hybrid --groups 3", 9),
        ("--replicas 2 --update local_steps", 3),
        ("", 0),
    ],
)
@pytest.mark.parametrize("gpus", [False, True])
def test_every_process_is_counted(said: str, processes: int, gpus: bool) -> None:
    on_gpus = gpus and bool(processes)
    training = parsed(["digits", *said.split(), *(["--devices", "gpu"] if on_gpus else [])])
    own = argparse.Namespace(cpus=2.0, gpus=1.0)
    found = asked_for(own, training)
    assert found == Asked(2.0, 1.0, processes, on_gpus)


@pytest.mark.parametrize("said", ["--devices 2 --replicas 2", "--devices gpu", "--resume x"])
def test_what_cannot_be_handed_in_is_refused_at_once(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["digits", "--cluster", "local", *said.split()])
    assert "submitted run" in capsys.readouterr().err
