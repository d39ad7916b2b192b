"""What is recorded about the machine and the source."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from millrace.train.environment import device_names, environment, git_commit
from millrace.version import __version__


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(directory), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_environment_is_json_and_tells_versions_and_machine() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["millrace"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["working_directory"] == os.getcwd()
    assert shlex.split(str(facts["command"])) == [sys.executable, *sys.orig_argv[1:]]


def test_asking_does_not_wake_cuda() -> None:
    before = torch.cuda.is_initialized()
    names = device_names()
    assert names[0].startswith("cpu (")
    assert len(names) >= 1 + torch.cuda.device_count()
    assert torch.cuda.is_initialized() == before


def test_the_commit_is_told_with_local_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == commit + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None
