"""What sessions over processes that may be lost have in common, however their replicas agree.

A subclass has a state machine that decides what to do next; here members are heard, and its commands carried out.
"""

from __future__ import annotations

import abc
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from torch import Tensor

from millrace import errors
from millrace.compile.tiered import Say
from millrace.errors import (
    FetchError,
    MillraceError,
    OutOfMemoryError,
    SettingError,
    StepError,
    VariablesLostError,
    WorkerError,
    did_you_mean,
)
from millrace.graph.graph import TRAIN, Graph
from millrace.replicas import hub as hub_events
from millrace.replicas.divided import Devices, Placer
from millrace.replicas.gpus import least_used
from millrace.replicas.hub import Hub
from millrace.replicas.pool_events import Kill, PoolCommand
from millrace.replicas.programs import Programs
from millrace.replicas.protocol import (
    DriverCommand,
    Expect,
    Failed,
    Fields,
    Joined,
    Lost,
    Said,
    StartMembers,
    Stop,
    Story,
    Tell,
)
from millrace.replicas.step_times import StepTimes
from millrace.replicas.worker import GRAPH
from millrace.runtime.aliasing import Memory
from millrace.runtime.feeds import FeedReader
from millrace.runtime.messages import Message
from millrace.runtime.remote_session import RemoteSession

log = logging.getLogger(__name__)

CONTROL_S = 120.0  # for taking a role, sending a copy all it is to have, reading and writing all variables
_TURN_S = 1.0
_MOST_FAILURES = 3  # in one step, of processes that others can replace; then the step is at fault
_STORIES = 200  # kept for errors
_STORIES_TOLD = 12


class MembersSettings(TypedDict, total=False):
    """What every session over members may be given.

    variables: name -> value, where they are not `graph.initial`.
    compile: as for `Session`.
    patience_s: how long a worker may do nothing that can be seen. None: ten times what a step takes, at least 2 s.
    drop_failing: whether a worker whose step raises an error is replaced like one that was killed. Otherwise, by
        default, the error ends the run.
    devices: what every replica is divided over; None: it computes in one process.
    gpus: whether every replica computes on a GPU of its machine.
    directory: what the processes share; the session removes it.
    """

    variables: Mapping[str, Tensor] | None
    compile: str
    patience_s: float | None
    drop_failing: bool
    devices: Devices | None
    gpus: bool
    directory: TemporaryDirectory[str] | None
    say: Say


class MembersSession(RemoteSession):
    """Attributes: stories: what happened to the members, the last last. closed: whether the session is."""

    _programs: Programs

    def __init__(
        self,
        graph: Graph,
        hub: Hub,
        *,
        variables: Mapping[str, Tensor] | None = None,
        compile: str = "tiered",
        patience_s: float | None = None,
        drop_failing: bool = False,
        devices: Devices | None = None,
        gpus: bool = False,
        directory: TemporaryDirectory[str] | None = None,
        say: Say = log.info,
    ) -> None:
        """hub: starts processes and hears of them; the session closes it. Of the rest, see `MembersSettings`."""
        super().__init__(graph, variables, say)
        self.stories: deque[str] = deque(maxlen=_STORIES)
        self.closed = False
        self._hub, self._directory = hub, directory
        self._compile, self._drop_failing, self._say = compile, drop_failing, say
        self._devices, self._on_gpus = devices, gpus
        placer = Placer(devices, compile=compile, say=say) if devices else None
        self._divided: dict[str, Any] = (
            {"microbatches": devices.microbatches, "placed": placer.pieces} if devices and placer else {}
        )
        self._times = StepTimes(compile, patience_s)
        self._reader = FeedReader(graph, Memory([]))
        self._hosts: dict[str, str] = {}  # the machine of every member that there was
        self._gpus: dict[str, tuple[str, ...]] = {}  # and the GPUs that it may use
        self._gpu_of: dict[str, str] = {}  # that of each worker
        self._has_nccl = True  # every member
        self._told_of_sharing = False
        self._given: dict[str, set[int]] = {}  # which programs each worker has
        self._fresh: set[str] = set()  # workers that have not run yet what they were given last
        self._beside: dict[tuple[str, str], Message] = {}  # the newest message of each member and kind
        self._failures: Counter[int] = Counter()  # of the step, by number, in members who were replaced then
        self._failure = ""

    def close(self) -> None:
        """End the processes; what they hold of the variables goes with them."""
        self.closed = True
        self._hub.close()
        if self._directory is not None:
            self._directory.cleanup()

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._hub.clear("the run begins again")
        for of_members in (self._hosts, self._gpus, self._gpu_of, self._given, self._fresh, self._beside):
            of_members.clear()
        self._failures.clear()
        self._stale, self._failure = False, ""
        self._start()

    @abc.abstractmethod
    def _start(self) -> None:
        """Have a new state machine begin with the first members."""

    def resize(self, replicas: int) -> None:
        """From now on have so many replicas, as the session counts them. Call it between two steps, or in a stream.

        Those who come take the variables from others; those who are too many end. Nothing that was begun is lost.

        Raises: SettingError when it is no number of replicas; WorkerError when the session is closed, or has failed.
        """
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1:
            raise SettingError(f"resize({replicas!r}): expected a whole number of at least 1")
        self._check_open()
        self._resize(replicas)

    @abc.abstractmethod
    def _resize(self, replicas: int) -> None:
        """Have the state machine aim at so many."""

    def kill(self, member: str) -> None:
        """End one of the processes by SIGKILL, as a fault would."""
        self._hub.kill(member, "it was killed on purpose")

    @property
    def workers(self) -> tuple[str, ...]:
        """The processes that compute, and are not known to be lost."""
        there = self._hub.members
        return tuple(member for member in list(self._given) if member in there)

    @property
    def members(self) -> tuple[str, ...]:
        """All processes that have joined and are not known to be lost, those that stand by among them."""
        return self._hub.members

    @property
    @abc.abstractmethod
    def complete(self) -> bool:
        """Whether everybody who is to be there has joined and does what it is to do."""

    @property
    def may_lose_a_worker(self) -> bool:
        """Whether any one of the workers may end now, and the others have all variables. For any thread."""
        return len(self.workers) > 1

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need; see `Session.run`. What changes no variable runs in this process.

        Raises: besides what `Session.run` raises, WorkerError when the variables are lost, StepError naming the worker
            whose batch or slice failed.
        """
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        if TRAIN not in names:
            self.pull()
            return self._own.run(fetches, feed)
        found = self._train(names, feed)
        return found[0] if isinstance(fetches, str) else found

    @abc.abstractmethod
    def _train(self, names: Sequence[str], feed: Any) -> list[Any]:
        """The fetches of a step, which is taken."""

    def _check_fetches(self, names: Iterable[str], known: Collection[str], where: str) -> None:
        for name in names:
            if name not in known:
                raise FetchError(f"{name!r} is no fetch of a step over {where}. {did_you_mean(name, list(known))}")

    def read_all(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `RemoteSession.read_all`."""
        known = self._own.variables
        wanted = [v.name for v in self.graph.variables] if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise FetchError(f"no variable is called {name!r}. {did_you_mean(name, list(known))}")
        newer = self._read_members() if self._stale else {}
        return {name: newer[name] if name in newer else known[name].clone() for name in wanted}

    @abc.abstractmethod
    def _read_members(self) -> Mapping[str, Tensor]:
        """Copies of the values of all variables that others have changed."""

    # -- members -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _decide(self, event: Joined | Lost | Said) -> None:
        """Carry out what the state machine says to an event."""

    def _prepare(self, member: str, kind: str, fields: Fields) -> None:
        """See to it that a member has the programs for what it is about to be told."""
        return

    @abc.abstractmethod
    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        """Send a message with what belongs beside it."""

    def _keep(self, member: str, message: Message) -> None:
        """Keep what came beside a message."""
        self._beside[member, message.kind] = message

    def _hear(self, within_s: float = _TURN_S) -> bool:
        """Wait for something to happen, and do what follows. Bounded: whoever is waited for is under `Expect`.

        Returns: whether something did. Raises: WorkerError when the session has failed, now or before.
        """
        self._check_open()
        event = self._hub.next(within_s)
        match event:
            case hub_events.Joined(member, host=host, gpus=gpus, nccl=nccl):
                self._hosts[member], self._gpus[member] = host, gpus
                self._has_nccl = self._has_nccl and nccl
                self._decide(Joined(member))
            case hub_events.Lost(member, why):
                self._fresh.discard(member)
                if self._given.pop(member, None) is not None:  # not one that stood by, or was not needed any more
                    self._say(f"worker {member} was lost{self._when(member)}: {why}")
                self._decide(Lost(member, why))
            case hub_events.Said(member, message):
                if message.kind == "error":
                    self._failed_in(member, message)
                else:
                    if message.kind == "done":
                        self._fresh.discard(member)
                    self._keep(member, message)
                    self._decide(Said(member, message.kind, message.fields))
        return event is not None

    def _check_open(self) -> None:
        if self._failure:
            raise WorkerError(f"this session has failed before: {self._failure}")
        if self.closed:
            raise WorkerError("this session is closed: make another one.")

    @property
    def _holders(self) -> int:
        """How many workers may end before variables are lost."""
        return _MOST_FAILURES

    @property
    @abc.abstractmethod
    def _present_step(self) -> int:
        """The first step of this session that is not done, from 1."""

    def _step_of(self, member: str) -> int | None:
        """The step of this session that a member works at, from 1."""
        return None

    def _when(self, member: str) -> str:
        step = self._step_of(member)
        return "" if step is None else f", step {self.taken_before + step}"

    def _begin_worker(self, member: str) -> dict[str, Any]:
        """Note that a member is given the role of a worker. Returns: what every such role says."""
        role = {
            "compile": self._compile,
            "devices": self._devices.as_fields() if self._devices else None,
            "gpu": self._choose_gpu(member) if self._on_gpus else None,
        }
        self._given[member] = set()
        self._fresh.add(member)
        return role

    def _choose_gpu(self, member: str) -> int:
        visible, host = self._gpus[member], self._hosts[member]
        if not visible:
            self._failure = (
                f"{member} was to compute on a GPU, but PyTorch sees none on {host}. Leave devices out, or choose "
                "machines that have GPUs and a PyTorch for them."
            )
            raise SettingError(self._failure)
        beside = [self._gpu_of[worker] for worker in self._given if self._hosts[worker] == host]
        index = least_used(visible, beside)
        self._gpu_of[member] = visible[index]
        if visible[index] in beside and not self._told_of_sharing:
            self._told_of_sharing = True
            self._say(f"{host} has fewer GPUs than replicas ({len(visible)}): some share one, and do not use NCCL")
        return index

    def _meeting(self, members: Collection[str]) -> dict[str, Any]:
        """What those who are to form a group have to know of where they are."""
        hosts = {self._hosts[member] for member in members}
        gpus = {(self._hosts[member], self._gpu_of.get(member)) for member in members}
        own_gpus = self._on_gpus and self._has_nccl and len(gpus) == len(members)
        return {"one_host": len(hosts) == 1, "own_gpus": own_gpus}

    def _load(self, member: str, key: int) -> None:
        """Have a worker make a program ready, unless it has it."""
        if key not in self._given[member]:
            self._given[member].add(key)
            self._fresh.add(member)
            program = {GRAPH: self._programs.content(key), **self._programs.beside(key)}
            self._hub.send(member, Message("program", {"key": key}, program))

    def _failed_in(self, member: str, message: Message) -> None:
        who = f"worker {member}" if member in self._given else member
        text = f"{who}{self._when(member)}: {message.fields['text']}"
        self.stories.append(text)
        kind: type[MillraceError] = getattr(errors, message.fields["type"], StepError)
        step = self._step_of(member) or self._present_step
        # Its process ends, which is a loss like any other.
        if kind is WorkerError:  # of others, not of the user's code
            self._say(f"{text}\nIt is replaced.")
            return
        self._failures[step] += 1
        may_pass = self._drop_failing or kind is OutOfMemoryError  # another process may have more
        if may_pass and self._failures[step] < min(_MOST_FAILURES, self._holders):
            self._say(f"{text}\nIt is replaced.")
            return
        if may_pass:
            text += f"\n  {self._failures[step]} processes have failed in this step; no more are tried."
        self._failure = text
        raise kind(text)

    def _carry_out(self, commands: Iterable[DriverCommand | PoolCommand]) -> None:
        try:
            self._do(list(commands))
        except BaseException as error:  # the state machine takes the rest for done, too
            self._failure = self._failure or f"{type(error).__name__}: {error}"
            raise

    def _do(self, commands: Sequence[DriverCommand | PoolCommand]) -> None:
        for command in commands:  # whose program is new is known before anybody is told how long to wait for others
            if isinstance(command, Tell):
                self._prepare(command.member, command.kind, command.fields)
        for command in commands:
            match command:
                case Tell(member, kind, fields):
                    self._tell(member, kind, dict(fields))
                case StartMembers(count):
                    self._hub.start(count)
                case Stop(member):
                    self._given.pop(member, None)
                    self._fresh.discard(member)
                    self._hub.kill(member, "not needed any more")
                case Kill(member, why):
                    self._given.pop(member, None)
                    self._fresh.discard(member)
                    self._hub.kill(member, why)
                case Expect(member, doing):
                    self._hub.expect(member, None if doing is None else self._within_s(doing))
                case Story(text):
                    self.stories.append(text)
                    log.debug(text)
                case Failed(reason, variables_lost):
                    self._failure = reason
                    error = VariablesLostError if variables_lost else WorkerError
                    raise error(f"{reason}\nWhat happened:\n  " + "\n  ".join(list(self.stories)[-_STORIES_TOLD:]))
                case _:
                    self._take(command)

    @abc.abstractmethod
    def _take(self, command: DriverCommand | PoolCommand) -> None:
        """Take an answer of the state machine."""

    def _within_s(self, doing: str) -> float:
        """How long a member may show no progress while it is to do something."""
        return self._patience_s

    @property
    def _patience_s(self) -> float:
        """How long anybody may show no progress. While somebody runs a program for the first time, which may have to be
        compiled, others may wait for that; who is frozen is noticed all the same."""
        return self._times.first_s if self._fresh else self._times.patience_s
