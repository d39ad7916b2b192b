"""Runs as jobs of a cluster, of which there is a stand-in here; a real one is in tests/cli/test_submit.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from millrace.cli.main import FAILED, OK, USAGE, main
from millrace.errors import SettingError, WorkerError
from millrace.runtime.jobs import ClusterSize, Job, JobRequest
from millrace.zoo.submitted import Asked, find_submitted, log_of, resume, submit, submitted_runs, summarize_submitted

Captured = pytest.CaptureFixture[str]


class Cluster:
    """Jobs that are as a test says."""

    address = "http://there:8265"

    def __init__(self) -> None:
        self.requests: list[JobRequest] = []
        self.jobs: dict[str, Job] = {}
        self.stopped: list[str] = []

    def submit(self, request: JobRequest) -> None:
        assert request.name not in self.jobs
        self.requests.append(request)
        self.jobs[request.name] = Job(request.name, "running", "", None, 1e9 + len(self.jobs), request.notes)

    def all(self) -> list[Job]:
        return [Job("other", "running", "", None, 0.0, {}), *self.jobs.values()]

    def get(self, name: str) -> Job:
        return self.jobs[name]

    def log(self, name: str) -> str:
        return f"step {len(name)}/99  loss 0.5  7 steps/s\n"

    def stop(self, name: str) -> None:
        self.stopped.append(name)
        self.becomes(name, "stopped", None)

    def size(self) -> ClusterSize:
        return ClusterSize(4.0, 0.0, 2)

    def becomes(self, name: str, status: str, exit_code: int | None) -> None:
        self.jobs[name] = replace(self.jobs[name], status=status, exit_code=exit_code, message="so it is")


SMALL = Asked(processes=2)


def handed_in(cluster: Cluster, asked: Asked = SMALL) -> str:
    division = ["--replicas", "1"] if asked.processes else []
    return submit(cluster, "digits", ["--set", "x=a b"], division, asked=asked, directory="~/my runs", python="py").name


def test_a_run_is_a_job_of_its_name_and_goes_on_as_another() -> None:
    cluster = Cluster()
    name = handed_in(cluster)
    (request,) = cluster.requests
    assert request.name == name
    assert request.cpus == 1
    assert request.command == (
        f"exec py -m millrace train digits --set 'x=a b' --run-dir \"$HOME\"/'my runs/{name}' --replicas 1 "
        '--cluster "$RAY_ADDRESS"'
    )
    with pytest.raises(SettingError, match=f"{name} is running at http://there:8265: it need not be resumed"):
        resume(cluster, find_submitted(cluster, name), [], "py")
    cluster.becomes(name, "failed", 130)
    assert find_submitted(cluster, name).state == "interrupted"
    again = resume(cluster, find_submitted(cluster, "latest"), ["--set", "steps=9"], "py")
    assert (again.name, again.job.name) == (name, f"{name}.2")
    assert cluster.requests[1].command == (
        f"exec py -m millrace train --resume \"$HOME\"/'my runs/{name}' --set steps=9 --replicas 1 "
        '--cluster "$RAY_ADDRESS"'
    )
    assert [run.name for run in submitted_runs(cluster)] == [name], "jobs of others are not shown"
    assert log_of(cluster, again).count("\n") == 2
    assert summarize_submitted(cluster, again).steps_per_s == 7


def test_what_never_fits_is_refused_with_what_there_is() -> None:
    cluster = Cluster()
    with pytest.raises(SettingError) as refused:
        handed_in(cluster, Asked(cpus=2, processes=3))
    assert "asks for 2 CPU and 3 for its replicas' processes, and Ray at http://there:8265 has 4 CPU, 0 GPU" in str(
        refused.value
    )
    with pytest.raises(SettingError, match="1 CPU, 1 GPU"):
        handed_in(cluster, Asked(gpus=1))
    with pytest.raises(SettingError, match="2 for its replicas' processes, 2 GPU"):
        handed_in(cluster, Asked(processes=2, on_gpus=True))
    assert cluster.requests == []


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        ("waiting", None, "waiting"),
        ("running", None, "running"),
        ("stopped", None, "interrupted"),
        ("failed", 130, "interrupted"),
        ("failed", -9, "killed"),
        ("failed", 137, "killed"),
        ("failed", 1, "failed"),
        ("failed", None, "failed"),
        ("succeeded", 0, "finished"),
    ],
)
def test_states(status: str, code: int | None, state: str) -> None:
    cluster = Cluster()
    name = handed_in(cluster)
    cluster.becomes(name, status, code)
    assert find_submitted(cluster, name).state == state


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    for command in ("submit", "runs", "logs", "stop", "resume"):
        monkeypatch.setattr(f"millrace.cli.{command}.open_jobs", lambda address: found)
    return found


def test_the_commands(cluster: Cluster, capsys: Captured) -> None:
    where = ["--cluster", "http://there:8265"]
    assert main(["submit", "digits", "--set", "epochs=3", "--replicas", "1", "--update", "async", *where]) == USAGE
    assert "asks for 1 CPU and 4 for its replicas' processes" in capsys.readouterr().err, "a server, its copy, a spare"
    assert main(["submit", "digits", "--set", "epochs=3", "--replicas", "2", "--runs-dir=/r", *where, "--json"]) == OK
    assert "digits --set epochs=3 --run-dir /r/digits-" in cluster.requests[0].command
    assert "--replicas 2 --room-within 900 --cluster" in cluster.requests[0].command
    name = cluster.requests[0].name
    assert f'"run_dir": "/r/{name}"' in capsys.readouterr().out
    assert main(["runs", *where]) == OK
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == [name, "running", str(len(name)), "0.5", "7"]
    assert main(["logs", "digits", *where]) == OK
    assert "loss 0.5" in capsys.readouterr().out
    assert main(["stop", "digits", *where]) == OK
    assert f"{name} is interrupted at step {len(name)}. To go on: millrace resume {name}" in capsys.readouterr().out
    assert cluster.stopped == [name]
    assert main(["resume", name, *where]) == OK
    assert "goes on" in capsys.readouterr().out
    assert "--replicas 2 --room-within 900 --cluster" in cluster.requests[1].command
    cluster.becomes(f"{name}.2", "succeeded", 0)
    assert main(["logs", name, "--follow", *where]) == OK
    assert "is finished" in capsys.readouterr().err
    assert main(["stop", name, *where]) == OK
    assert "does not run: it is finished" in capsys.readouterr().out
    assert main(["logs", "x", *where]) == USAGE
    assert "No run is at http://there:8265 by the name 'x'" in capsys.readouterr().err


def test_how_long_to_wait_for_room_goes_along(cluster: Cluster) -> None:
    arguments = ["submit", "digits", "--replicas", "1", "--room-within", "60", "--cluster", "http://there:8265"]
    assert main(arguments) == OK
    assert cluster.requests[0].command.count("--room-within 60") == 1


def test_a_run_without_a_log_does_not_hide_the_others(
    cluster: Cluster, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, good = handed_in(cluster, Asked()), handed_in(cluster, Asked())
    log = cluster.log

    def log_or_not(name: str) -> str:
        if name == lost:
            raise WorkerError(f"Ray did not give the log of {name}")
        return log(name)

    monkeypatch.setattr(cluster, "log", log_or_not)
    assert main(["runs", "--cluster", "http://there:8265"]) == OK
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["run", good]
    assert captured.err == f"millrace runs: Ray did not give the log of {lost}\n"


def test_a_job_that_fails_at_once_is_told(cluster: Cluster, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = cluster.submit

    def failing(request: JobRequest) -> None:
        submitted(request)
        cluster.becomes(request.name, "failed", 1)

    monkeypatch.setattr(cluster, "submit", failing)
    assert main(["submit", "digits", "--cluster", "x"]) == FAILED
    assert "failed: so it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits --cluster x --devices 2", "--devices of a submitted run is gpu, with --replicas"),
        ("digits --cluster x --run-dir y", "--run-dir is not for submitted runs"),
        ("digits --cluster x --chaos 3", "--chaos and --room-within are for replicas"),
        ("digits", "required: --cluster"),
        ("--cluster x", "a TASK is needed"),
        ("digits --cluster x --frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_usage(arguments: str, message: str, cluster: Cluster, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", *arguments.split()])
    assert ended.value.code == USAGE
    assert message in capsys.readouterr().err
    assert cluster.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digit --cluster x", "Did you mean 'digits'"),
        ("digits --cluster x --set epoch=1", "Did you mean 'epochs'"),
        ("digits --cluster x --cpus -1", "expected numbers of at least 0"),
    ],
)
def test_wrong_values_are_found_here(arguments: str, message: str, cluster: Cluster, capsys: Captured) -> None:
    assert main(["submit", *arguments.split()]) == USAGE
    assert message in capsys.readouterr().err
    assert cluster.requests == []
