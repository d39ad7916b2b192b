"""What a user says of how replicas agree: wrong names and wrong values are refused in words."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest

from millrace.errors import SettingError
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync, Update, update_of, with_servers
from millrace.train.plan import Plan


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Async, {"bond": 3}, r"Async has no setting 'bond'\. Did you mean 'bound'\?"),
        (Sync, {"parameter_server": 1}, r"Sync has no setting 'parameter_server'\. Did you mean 'parameter_servers'\?"),
        (Hybrid, {"group": 2}, r"Hybrid has no setting 'group'\. Did you mean 'groups'\?"),
        (LocalSteps, {"momentun": 0.9}, r"LocalSteps has no setting 'momentun'\. Did you mean 'momentum'\?"),
        (Async, {"zzz": 1}, r"Async has no setting 'zzz'\. Known: bound, copies, fetch_every, "),
        (Async, {"parameter_servers": None}, r"Async\(parameter_servers=None\): expected a whole number of at least 1"),
        (Async, {"parameter_servers": True}, r"Async\(parameter_servers=True\): expected a whole number of at least 1"),
        (Async, {"bound": 0}, r"Async\(bound=0\): expected a whole number of at least 1"),
        (Sync, {"backup": -1}, r"Sync\(backup=-1\): expected a whole number of at least 0"),
        (Hybrid, {"groups": 2.0}, r"Hybrid\(groups=2\.0\): expected a whole number of at least 1"),
        (Async, {"overlap": None}, r"Async\(overlap=None\): expected True or False"),
        (Hybrid, {"copies": 1}, r"Hybrid\(copies=1\): expected True or False"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_expected(kind: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        kind(**given)


@pytest.mark.parametrize("update", [Sync(overlap=None), Async(bound=None), Hybrid(3, replicas=2), LocalSteps(5)])
def test_what_was_said_can_be_copied_and_changed_by_name(update: Update) -> None:
    assert copy.deepcopy(update) == update == pickle.loads(pickle.dumps(update))
    assert replace(update) == update
    with pytest.raises(SettingError, match="has no setting 'evry'"):
        replace(update, evry=1)


@pytest.mark.parametrize(
    ("said", "update"),
    [
        (("sync", 2, 1), Sync(parameter_servers=2, backup=1)),
        (("async", 3, None), Async(parameter_servers=3)),
        ((Async(bound=4), 2, None), Async(bound=4, parameter_servers=2)),
        ((Sync(parameter_servers=2), 2, None), Sync(parameter_servers=2)),
        ((Hybrid(3), 2, None), Hybrid(3, parameter_servers=2)),
        (("local_steps", None, None), LocalSteps()),
    ],
)
def test_servers_and_backup_workers_can_be_said_beside_the_way(said: Any, update: Update) -> None:
    assert with_servers(*said) == update
    plan = Plan(steps=1, replicas=2, update=said[0], parameter_servers=said[1], backup=said[2])
    assert update_of(plan.update) == update
    assert replace(plan, steps=2).update == plan.update


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (("local_steps", 2, None), r"parameter_servers=2: LocalSteps has no such setting"),
        (("async", None, 1), r"backup=1: Async has no such setting"),
        (("sync", None, 1), r"backup=1 needs parameter servers"),
        (("sync", -1, None), r"Sync\(parameter_servers=-1\): expected a whole number"),
        ((Async(parameter_servers=3), 2, None), r"parameter_servers=2, and update=Async\(parameter_servers=3, …\)"),
    ],
)
def test_servers_where_there_can_be_none_are_refused(said: Any, why: str) -> None:
    with pytest.raises(SettingError, match=why):
        with_servers(*said)
