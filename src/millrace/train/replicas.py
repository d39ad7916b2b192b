"""A run over replicas: the processes, and the session over them."""

from __future__ import annotations

import random
import secrets
import tempfile
import threading
import time
from pathlib import Path

import torch

from millrace.compile.tiered import Say
from millrace.errors import SettingError
from millrace.graph.graph import Graph
from millrace.replicas.hub import Hub
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import LocalSteps, Sync, update_of
from millrace.runtime.choose_launcher import choose_launcher
from millrace.runtime.launch import Launcher
from millrace.train.plan import Plan

_TOKEN_BYTES = 32
_MORE = 4


class ReplicaRun:
    """Makes the session of a run with `plan.replicas`. say: shows a line."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan, self._say = plan, say

    def session(self, graph: Graph) -> ReplicatedSession:
        """A session over processes that hold a replica each."""
        plan = self._plan
        assert plan.replicas is not None
        update = update_of(plan.update)
        if not isinstance(update, LocalSteps) and update != Sync():
            raise SettingError(f"update={plan.update!r} is not there yet: use 'sync' or 'local_steps'")
        # Short, as the paths of sockets must be, and only this user may enter it.
        directory = tempfile.TemporaryDirectory(prefix="millrace-")
        launcher = self._launcher(Path(directory.name))
        hub = Hub(launcher, secrets.token_bytes(_TOKEN_BYTES), Path(directory.name), self._say)
        rendezvous = Rendezvous(launcher.where.split(":")[1]) if launcher.where else Rendezvous()
        try:
            session = ReplicatedSession(
                graph,
                hub,
                rendezvous,
                local=update if isinstance(update, LocalSteps) else None,
                replicas=plan.replicas,
                spares=plan.spares,
                compile=plan.compile,
                patience_s=plan.patience_s,
                drop_failing=plan.drop_failing,
                directory=directory,
                say=self._say,
            )
            if plan.chaos_s is not None:
                threading.Thread(target=_chaos, args=(session, plan.chaos_s, plan.seed), daemon=True).start()
            return session
        except BaseException:
            hub.close()
            rendezvous.close()
            directory.cleanup()
            raise

    def _launcher(self, directory: Path) -> Launcher:
        plan = self._plan
        assert plan.replicas is not None
        threads = max(1, torch.get_num_threads() // plan.replicas)
        # On this machine there may be more processes than cores; who was lost may not have gone when the next comes.
        local = {"local_cpus": plan.replicas + plan.spares + _MORE} if plan.cluster == "local" else {}
        return choose_launcher(plan.cluster, "millrace.replicas.member", [], threads, directory, **local)


def _chaos(session: ReplicatedSession, every_s: float, seed: int) -> None:
    """Kill one of the workers now and then, until the session ends."""
    choices = random.Random(seed)
    while not session.closed:
        time.sleep(every_s)
        if len(workers := session.workers) > 1:  # nobody could give the variables of the last one to the next
            session.kill(choices.choice(workers))
