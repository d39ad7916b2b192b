"""Starting the processes of a run on a Ray cluster, or on a small Ray of this machine's own.

With `ray_jobs` the only module that imports Ray; `choose_launcher` imports it, when a cluster is asked for. Ray finds
the machines and counts their cores and GPUs; what the processes say to each other does not go through it. Nothing is
restarted by Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace import child_process
from millrace.errors import PlacementError, SettingError
from millrace.runtime import keeper, launch
from millrace.runtime.ray_token import protect, unprotect

try:
    import ray
    from ray import cloudpickle
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise SettingError(
        f"`cluster` needs Ray, which cannot be imported ({error}). Install it with: pip install 'millrace[ray]'"
    ) from error

_ANSWER_S = 5.0  # for a cluster's port
_KEEPER_S = 0.5  # for an actor to kill its process; then it is killed itself, and its process ends with it
_END_S = 5.0
_LOOK_S = 2.0  # for room, at a time
_OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; no tensor goes through it
_LONGEST_TEMPORARY = 40  # characters; Ray adds names of sockets, and all together may have 107

for _module in (child_process, launch, keeper):
    cloudpickle.register_pickle_by_value(_module)


@dataclass
class _Kept:
    """A process and its actor. ended: how, and its last words. pid: done once it is scheduled and has started."""

    actor: Any
    ended: Future[tuple[str, str]]
    pid: Future[int]
    since_s: float
    killed_s: float | None = None
    how: tuple[str, str] | None = None


class RayLauncher:
    """A `Launcher` whose processes are children of Ray actors, one each.

    Args:
        address: "local" starts a Ray on this machine, on loopback, for this run alone; "HOST:PORT" or
            "ray://HOST:PORT" joins one. Where this process has joined one already, that one is used.
        module, arguments, threads: as of `ProcessLauncher`.
        directory: where a local Ray keeps its files, if the path is short enough for sockets.
        cpus, gpus: what Ray is to reserve for each process; a local one no GPUs.
        local_cpus: how many cores a local Ray is told it has; by default those of this machine. local_share: which part
            of `cpus` it is to reserve.
        schedule_within_s: how long a cluster may take to find room for a process.
        processes: so many are reserved at once, before any of them is started, so that two runs do not each hold half
            of what they need. 0: none.
        say: is told what is waited for.

    Raises: SettingError when no cluster answers there; PlacementError when it finds no room for `processes`.
    """

    def __init__(
        self,
        address: str,
        module: str,
        arguments: Sequence[str],
        threads: int,
        directory: Path,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        local_cpus: float | None = None,
        local_share: float = 1.0,
        schedule_within_s: float = 30.0,
        processes: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._module = module
        self._arguments = tuple(arguments)
        self._environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._asked = {"CPU": cpus, "GPU": gpus}
        self._schedule_within_s = schedule_within_s
        self._address = address
        self._kept: dict[str, _Kept] = {}
        self._local: dict[str, float] = {}
        self.where: str | None = None
        if not ray.is_initialized():
            Config.initialize("")  # RAY_AUTH_MODE may have been set after Ray was imported
        if ray.is_initialized():
            self._leave: Callable[[], None] = lambda: None
            joined = ray.get_runtime_context().gcs_address
            if joined != address:
                say(f"this process has joined a Ray already, at {joined}: that one is used, not {address!r}")
            self.where = f"tcp:{ray.util.get_node_ip_address()}:0"
        elif address == "local":
            self._local = {"CPU": float(local_cpus or os.cpu_count() or 1)}
            # It is this run's alone: there may be many processes to a core, and they share the GPUs among themselves.
            self._asked = {"CPU": cpus * local_share, "GPU": 0.0}
            self._leave = _start(directory, self._local["CPU"])
            # Paths of this machine mean nothing to others, which have millrace installed.
            self._environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
        else:
            self.where = f"tcp:{_own_address(address)}:0"
            self._leave = _join(address)
        self._actors = ray.remote(keeper.Keeper)
        self._options: dict[str, Any] = {
            "num_cpus": self._asked["CPU"],
            "num_gpus": self._asked["GPU"],
            "max_restarts": 0,  # whoever is lost is replaced by a spare, which is quicker
            "max_task_retries": 0,
            "max_concurrency": 3,  # to wait for the end, to say who it is, to kill
        }
        self._reserved = 0
        self._room: Any = None
        if processes and not self._local and any(self._asked.values()):
            try:
                self._reserve(processes, say)
            except BaseException:
                self._leave()
                raise

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        """See `Launcher.start`. Where the cluster may yet find room, `exit_of` tells later that it has not."""
        alive = sum(self.exit_of(other) is None for other in self._kept)
        for kind, has in self._local.items():
            if (alive + 1) * self._asked[kind] > has:
                raise PlacementError(
                    f"{name} asks for {self._asked[kind]:g} {kind}, but the local Ray has {has:g} in all, and "
                    f"{alive} processes with {alive * self._asked[kind]:g} already. Ask for fewer replicas, servers "
                    "and spares, or for less of each, or use a cluster that has more."
                )
        inside = {}
        if alive < self._reserved:
            inside["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._room)
        actor = self._actors.options(**self._options, **inside).remote()
        ended = actor.run.remote(self._module, name, self._arguments, {**self._environment, **environment})
        self._kept[name] = _Kept(actor, ended.future(), actor.pid.remote().future(), time.monotonic())

    def kill(self, name: str) -> None:
        """See `Launcher.kill`."""
        kept = self._kept[name]
        if kept.killed_s is None and kept.how is None:
            kept.killed_s = time.monotonic()
            kept.actor.kill.remote()

    def exit_of(self, name: str) -> str | None:
        """See `Launcher.exit_of`."""
        kept = self._kept[name]
        now_s = time.monotonic()
        if kept.how is None and kept.ended.done():
            self._over(kept, _result(kept.ended))
        elif kept.how is None and not kept.pid.done() and now_s - kept.since_s > self._schedule_within_s:
            self._over(kept, (self._no_room(), ""))
        elif kept.how is None and kept.killed_s is not None and now_s - kept.killed_s > _KEEPER_S:
            self._over(kept, ("was killed with its Ray actor, which did not answer", ""))
        return kept.how[0] if kept.how else None

    def last_words(self, name: str) -> str:
        """See `Launcher.last_words`; known once it has ended."""
        how = self._kept[name].how
        return how[1] if how else ""

    @property
    def pids(self) -> dict[str, int]:
        """See `Launcher.pids`; numbers on their own machines."""
        return {
            name: kept.pid.result()
            for name, kept in self._kept.items()
            if kept.pid.done() and kept.pid.exception() is None
        }

    def close(self) -> None:
        """See `Launcher.close`. A local Ray ends with it."""
        alive = [name for name in self._kept if self.exit_of(name) is None]
        for name in alive:
            self.kill(name)
        wait([self._kept[name].ended for name in alive], _END_S)
        for name in alive:
            if self.exit_of(name) is None:
                self._over(self._kept[name], ("was killed with its Ray actor", ""))
        self._give_room_back()
        leave, self._leave = self._leave, lambda: None
        leave()

    def _reserve(self, processes: int, say: Callable[[str], None]) -> None:
        """Wait until Ray has room for all processes, and hold it."""
        bundle = {kind: count for kind, count in self._asked.items() if count}
        self._room = ray.util.placement_group([bundle] * processes, strategy="PACK")
        began_s, told = time.monotonic(), False
        try:
            while not self._room.wait(_LOOK_S):
                if time.monotonic() - began_s > self._schedule_within_s:
                    raise PlacementError(f"The {processes} processes of this run {self._no_room(processes)}.")
                if not told:
                    told = True
                    say(f"waiting up to {self._schedule_within_s:.3g} s for room: {self._demand(processes)}")
        except BaseException:
            self._give_room_back()
            raise
        self._reserved = processes

    def _give_room_back(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.util.remove_placement_group(room)

    def _over(self, kept: _Kept, how: tuple[str, str]) -> None:
        kept.how = how
        with contextlib.suppress(Exception):  # what it holds of Ray is free again; it may be gone already
            ray.kill(kept.actor)

    def _no_room(self, processes: int = 1) -> str:
        return (
            f"found no room within {self._schedule_within_s:.3g} s: {self._demand(processes)}. Ask for fewer replicas, "
            "servers and spares, or for less of each, or add machines"
        )

    def _demand(self, processes: int) -> str:
        each = ", ".join(f"{count:g} {kind}" for kind, count in self._asked.items() if count) or "nothing"
        asked = f"it asks for {each}" if processes == 1 else f"they ask for {each} each, {processes} times"
        has, free = ray.cluster_resources(), ray.available_resources()
        known = ", ".join(f"{has[k]:g} {k} of which {free.get(k, 0.0):g} free" for k in ("CPU", "GPU") if k in has)
        return f"{asked}; Ray at {self._address} has {known} on {len(ray.nodes())} machines"


def _result(ended: Future[tuple[str, str]]) -> tuple[str, str]:
    error = ended.exception()
    if error is None:
        return ended.result()
    return f"ended with its Ray actor ({type(error).__name__})", _last(error)


def _last(error: BaseException) -> str:
    """The last line of what it says; Ray's are long, and say most there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _start(directory: Path, cpus: float) -> Callable[[], None]:
    """Start a Ray of this machine's own. Returns: what ends it, with its files."""
    fits = len(str(directory.absolute())) + len("/ray") <= _LONGEST_TEMPORARY
    temporary = Path(directory.absolute(), "ray") if fits else Path(tempfile.mkdtemp(prefix="millrace-ray-"))
    protect()
    Config.initialize("")
    variables = {
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # processes share its GPUs among themselves
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # `_loopback`, for its other processes
    }
    try:
        with _undisturbed(variables), _loopback():  # for this process, as Ray read its environment when imported
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(temporary),
            )
    except BaseException:
        unprotect()
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    def end() -> None:
        try:
            ray.shutdown(wait_for_processes=True)
        except TypeError:  # earlier versions always leave before their processes have
            ray.shutdown()
        unprotect()
        shutil.rmtree(temporary, ignore_errors=True)

    return end


def _join(address: str) -> Callable[[], None]:
    retries = ray_constants.NUM_REDIS_GET_RETRIES
    ray_constants.NUM_REDIS_GET_RETRIES = 1  # of half a minute each; somebody listens there, or we would not be here
    try:
        with _undisturbed({}), _loopback() if _only_on_loopback(address) else contextlib.nullcontext():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise SettingError(f"Ray at {address} cannot be joined ({type(error).__name__}): {_last(error)}") from error
    finally:
        ray_constants.NUM_REDIS_GET_RETRIES = retries
    leave: Callable[[], None] = ray.shutdown
    return leave


@contextlib.contextmanager
def _undisturbed(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while Ray starts; afterwards this process is as it was."""
    before = {name: os.environ.get(name) for name in (*variables, "PYTHONBREAKPOINT")}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.ERROR)  # it would advise the user on the token
    os.environ.update(variables)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if in_main:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this machine's only address; otherwise it looks for one that others can reach."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _only_on_loopback(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host.startswith("127.") and host != "localhost":
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), _ANSWER_S).close()
    except OSError:
        return True
    return False


def _own_address(address: str) -> str:
    """The address that this machine has for those of the cluster."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise SettingError(f"cluster={address!r} is no cluster: expected 'local', 'HOST:PORT' or 'ray://HOST:PORT'.")
    try:
        with socket.create_connection((host, int(port)), _ANSWER_S) as connection:
            own: str = connection.getsockname()[0]
            return own
    except OSError as error:
        raise SettingError(
            f"no Ray cluster answers at {address} ({error.strerror or error}). Start one (`ray start --head`), or use "
            "cluster='local'."
        ) from error
