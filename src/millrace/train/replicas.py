"""A run over replicas: the processes, the session over them, and what the run directory tells of their updates.

staleness.json     of a run over parameter servers: how many updates had each staleness, repeats, dropped gradients
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from millrace.compile.tiered import Say
from millrace.errors import SettingError
from millrace.graph.graph import Graph
from millrace.place.hints import Hints
from millrace.replicas.divided import Devices
from millrace.replicas.hub import EXIT_WITHIN_S, Hub
from millrace.replicas.hybrid_session import HybridSession
from millrace.replicas.members_session import MembersSettings
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.server_session import ServerSession
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync, Travel, Update, processes, update_of
from millrace.runtime.choose_launcher import choose_launcher
from millrace.runtime.handshake import new_token
from millrace.runtime.launch import Launcher
from millrace.runtime.scratch import ScratchDirectory
from millrace.train.callbacks import Callback, RunView
from millrace.train.devices import cluster_of
from millrace.train.plan import Plan
from millrace.train.result import Result
from millrace.train.run_files import encode_json, write_atomically
from millrace.train.run_state import Outcome

STALENESS = "staleness.json"
_MORE = 4
_LOCAL_SHARE = 1 / 64  # a Ray of the run's own takes as many processes as `resize` asks for
_GPU_FREE_S = 5.0


class ReplicaRun(Callback):
    """Makes the session of a run with `plan.replicas`; as a callback, writes the file above. say: shows a line."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan, self._say = plan, say
        self._servers: ServerSession | None = None

    def session(self, graph: Graph) -> ReplicatedSession | ServerSession:
        """A session over the processes.

        Raises: SettingError for a step that cannot be trained so.
        """
        update = update_of(self._plan.update)
        idle = told_of_idle(graph, self._plan.replicas or 1)
        if idle and not isinstance(update, Async):
            self._say(idle)
        self._say(f"starting {processes(update, self._plan.replicas or 1, self._plan.spares)} processes")
        directory = ScratchDirectory()
        path = Path(directory.name)
        # A GPU is free again, for whoever takes the place of a lost worker, once that has ended.
        exit_within_s = _GPU_FREE_S if self._plan.on_gpus else EXIT_WITHIN_S
        session: ReplicatedSession | ServerSession
        with contextlib.ExitStack() as undo:
            undo.callback(directory.cleanup)
            launcher = undo.enter_context(contextlib.closing(self._launcher(path)))
            hub = undo.enter_context(
                contextlib.closing(Hub(launcher, new_token(), path, self._say, exit_within_s=exit_within_s))
            )
            session = self._of(update, graph, hub, launcher.where, directory)
            if isinstance(session, ServerSession):
                self._servers = session
            if self._plan.chaos_s is not None:
                chaos = threading.Thread(
                    target=_chaos, args=(session, self._plan.chaos_s, self._plan.seed), daemon=True
                )
                chaos.start()
            undo.pop_all()  # the session closes all three
        return session

    def completed(self, result: Result) -> Result:
        """The result of the run, with what is known of its updates."""
        servers = self._servers
        if servers is None:
            return result
        return replace(result, mean_staleness=servers.mean_staleness, repeats=servers.repeats, dropped=servers.dropped)

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        """Write how stale updates were."""
        self._write(run)

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        """Write how stale updates were."""
        self._write(run)

    def _write(self, run: RunView) -> None:
        servers = self._servers
        if servers is None or run.directory is None:
            return
        content = {
            "updates_by_staleness": {str(tau): times for tau, times in sorted(servers.staleness.items())},
            "mean_staleness": servers.mean_staleness,
            "repeats": servers.repeats,
            "dropped": servers.dropped,
        }
        write_atomically(run.directory / STALENESS, encode_json(content))

    def _of(
        self,
        update: Update,
        graph: Graph,
        hub: Hub,
        where: str | None,
        directory: ScratchDirectory,
    ) -> ReplicatedSession | ServerSession:
        plan = self._plan
        assert plan.replicas is not None
        settings: MembersSettings = {
            "compile": plan.compile,
            "patience_s": plan.patience_s,
            "drop_failing": plan.drop_failing,
            "devices": self._devices(),
            "gpus": plan.on_gpus,
            "directory": directory,
            "say": self._say,
        }
        if isinstance(update, Async) or (isinstance(update, Sync) and update.parameter_servers):
            return ServerSession(graph, hub, update, replicas=plan.replicas, spares=plan.spares, **settings)
        rendezvous = Rendezvous(where.split(":")[1]) if where else Rendezvous()
        wire = plan.wire if isinstance(plan.wire, str) else None
        travel = Travel(plan.transport, wire, update.overlap if isinstance(update, Sync) else None)
        numbers: dict[str, int] = {"replicas": plan.replicas, "spares": plan.spares}
        try:
            if isinstance(update, Hybrid):
                return HybridSession(graph, hub, rendezvous, update, travel=travel, **numbers, **settings)
            local = update if isinstance(update, LocalSteps) else None
            return ReplicatedSession(graph, hub, rendezvous, local=local, travel=travel, **numbers, **settings)
        except BaseException:
            rendezvous.close()
            raise

    def _devices(self) -> Devices | None:
        """What every replica is divided over."""
        plan = self._plan
        if plan.devices is None or plan.replicas is None or plan.on_gpus:
            return None
        cluster = cluster_of(plan.devices, self._say)
        gpus = [device.name for device in cluster.devices if device.kind != "cpu"]
        hosts = {device.host for device in cluster.devices}
        if gpus or len(hosts) > 1:
            raise SettingError(
                "devices=… with replicas=…: every replica is divided over CPU workers of its own machine, not over "
                f"{', '.join(gpus or sorted(hosts))}. Pass devices=2, say, or devices='gpu' for one GPU each."
            )
        found = Devices(cluster, Hints.of(plan.placement), plan.seed, plan.microbatches)
        return found if plan.cluster not in (None, "local") else found.shared_by(plan.workers)

    def _launcher(self, directory: Path) -> Launcher:
        plan = self._plan
        threads = max(1, torch.get_num_threads() // plan.workers)
        # On this machine there may be more processes than cores; who was lost may not have gone when the next comes.
        assert plan.replicas is not None
        count = processes(plan.update, plan.replicas, plan.spares)
        prepared = [] if plan.devices is None else ["--gpus" if plan.on_gpus else "--divided"]
        return choose_launcher(
            plan.cluster,
            "millrace.replicas.member",
            [*prepared, "--imports", *plan.imports],
            threads,
            directory,
            gpus=1.0 if plan.on_gpus else 0.0,
            local_cpus=count + _MORE,
            local_share=_LOCAL_SHARE,
            processes=count,
            schedule_within_s=plan.room_within_s,
            say=self._say,
        )


def told_of_idle(graph: Graph, replicas: int) -> str:
    """What is to be said where a batch that is divided over so many has too few examples; "" where it has enough."""
    least = min((feed.spec.shape[0] for feed in graph.feeds if feed.spec.shape), default=replicas)
    if replicas <= least:
        return ""
    return (
        f"a batch of {least} examples has a slice for no more than {least} of {replicas} replicas; the others are "
        'idle. Take larger batches, fewer replicas, or update="async".'
    )


def _chaos(session: ReplicatedSession | ServerSession, every_s: float, seed: int) -> None:
    """Kill one of the workers now and then, until the session ends."""
    choices = random.Random(seed)
    while not session.closed:
        time.sleep(every_s)
        workers = session.workers
        if workers and session.may_lose_a_worker:  # nobody could give the variables of the last one to the next
            session.kill(choices.choice(workers))
