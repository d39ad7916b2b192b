"""What is the same in all kinds of sessions over members."""

from __future__ import annotations

import pytest
from tests.graph.step_models import step_graph
from tests.replicas.real_session import session_over, train

from millrace.errors import SettingError, WorkerError
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync, Update

WAYS = [Sync(), LocalSteps(), Sync(parameter_servers=1, copies=False), Async(copies=False), Hybrid(1, copies=False)]


@pytest.mark.parametrize("update", WAYS, ids=["sync", "local_steps", "sync over servers", "async", "hybrid"])
def test_a_number_of_replicas_that_there_cannot_be_is_refused_and_the_session_goes_on(update: Update) -> None:
    with session_over(step_graph("mlp", "sgd"), update, 1) as session:
        for wrong in (0, -1, 2.0, True, "3", None):
            with pytest.raises(SettingError, match=r"^resize\(.*expected a whole number of at least 1"):
                session.resize(wrong)
        assert len(train(session, "numbers", 2)) == 2
        assert len(session.workers) == 1
    with pytest.raises(WorkerError, match="this session is closed"):
        session.resize(2)
