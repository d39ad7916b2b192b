"""Members that all reach the driver and not each other, in real processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tests.graph.step_models import step_graph
from tests.replicas import cut_group
from tests.replicas.real_session import session_over, train, values_of

from millrace.replicas.settings import Hybrid, Sync, Update
from millrace.runtime.launch import ProcessLauncher


def launcher_in(directory: Path) -> ProcessLauncher:
    return ProcessLauncher("millrace.replicas.member", ["--imports", cut_group.__name__], 1, directory)


@pytest.mark.parametrize("update", [Sync(), Hybrid(groups=1, copies=False)], ids=["sync", "hybrid"])
def test_nobody_is_ended_because_all_wait_for_each_other(update: Update) -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, update, 2) as session:
        expected, final = train(session, "numbers", 6), values_of(session)
    with session_over(graph, update, 2, launcher_in=launcher_in) as session:
        found = train(session, "numbers", 1)
        members, slowest_s = session.members, 0.0
        for step in range(1, 6):
            began_s = time.monotonic()
            found += train(session, "numbers", 1, step)
            slowest_s = max(slowest_s, time.monotonic() - began_s)
        print(f"the slowest step took {slowest_s:.2f} s")
        assert slowest_s > 1.0  # the link was cut
        assert session.members == members
        after = values_of(session)
    assert found == pytest.approx(expected, rel=1e-12)
    for name, value in final.items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12)
