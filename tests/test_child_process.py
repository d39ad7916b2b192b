"""A child gives way to others, in its session's place as well as in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.child_process import modules_path

PROGRAM = """
from pathlib import Path
from millrace.child_process import give_way
give_way(7)
print(Path("/proc/self/autogroup").read_text() if Path("/proc/self/autogroup").exists() else "")
import os
print(os.nice(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of sessions is Linux's")
def test_a_child_gives_way_as_a_session() -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(modules_path())},
        start_new_session=True,
        capture_output=True,
        text=True,
        check=True,
    )
    group, *_, niceness = said.stdout.split("\n")[:-1]
    assert int(niceness) == os.nice(0) + 7
    if Path("/proc/self/autogroup").exists() and group:
        assert group.endswith(f"nice {niceness}")
