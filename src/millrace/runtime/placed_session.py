"""A session whose graph is divided over several devices."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import FetchError, MillraceError, did_you_mean
from millrace.graph.graph import TRAIN, Graph
from millrace.partition.files import save_program
from millrace.partition.program import Partition
from millrace.place.wire import Wire
from millrace.runtime.messages import Message
from millrace.runtime.placed_programs import Place, Program, Programs
from millrace.runtime.remote_session import RemoteSession
from millrace.runtime.transport.choose import check_transport, choose
from millrace.runtime.wire_bytes import Reported, WireBytes, sent_in_step
from millrace.runtime.workers import Workers

log = logging.getLogger(__name__)

_COMPILE_TIMEOUT_S = 3600.0
_LARGEST_MESSAGE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Timeline:
    """What every device did in one step.

    graph: what was run. partition: how it was cut. times: device -> the moments at which its instructions began and the
    last one ended, in seconds of the host's monotonic clock. wire: what it sent.
    """

    graph: Graph
    partition: Partition
    times: Mapping[str, Sequence[float]]
    wire: WireBytes


class PlacedSession(RemoteSession):
    """Holds the variables of a graph on several devices; runs fetches.

    Every device is a worker that holds its own variables; in each step it gets one message, and the tensors that
    devices need of each other go directly between them. Close it, or use it as a context, to end the workers.

    Args:
        graph: of the whole step.
        place: from a graph (the part of the step that some fetches need, its batch already in microbatches) to pieces
            with devices. The first graph that it gets is the whole step.
        workers: the devices' processes; the session ends them.
        variables: name -> value, where they are not `graph.initial`.
        microbatches: into how many parts each batch is divided; a batch that cannot be divided so is divided into as
            many as can be. reduction: see `passes.microbatch`.
        transport: how tensors travel: "shared_memory" or "gloo"; None: shared memory, and gloo where a step's devices
            are on several hosts.
        wire: how tensors are narrowed on their way between devices: "bfloat16", "int8" or "zeros", or a mapping from
            patterns of modules or tensors to these, such as {"encoder.*": "int8"}; see `place.wire`. None: not at all.
        compile: as for `Session`. timeout_s: how long any one wait may take, but for the compiler.
    """

    def __init__(
        self,
        graph: Graph,
        place: Place,
        workers: Workers,
        variables: Mapping[str, Tensor] | None = None,
        *,
        microbatches: int = 1,
        reduction: str = "mean",
        transport: str | None = None,
        wire: Wire | Mapping[str, str] | str | None = None,
        compile: str = "tiered",
        timeout_s: float = 300.0,
        say: Say = log.info,
    ) -> None:
        check_transport(transport)
        super().__init__(graph, variables, say)
        self.microbatches = microbatches
        self.timeline: Timeline | None = None  # of the last step, while `watch_time` is set
        self.watch_time = False
        self._workers = workers
        self._transport, self._compile, self._timeout_s, self._say = transport, compile, timeout_s, say
        self._step = 0
        self._tiers: dict[int, dict[str, list[str]]] = {}  # of the programs that the workers have, by device
        self._sent: tuple[Partition, list[Reported]] | None = None  # of the last step
        self._programs = Programs(graph, place, Wire.of(wire), microbatches, reduction, say)
        self.homes = self._programs.homes
        self.push()

    def close(self) -> None:
        """End the workers; what they hold of the variables goes with them."""
        self._workers.close()

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need; see `Session.run`.

        Raises: besides what `Session.run` raises, WorkerError when a device has ended or kept the others waiting.
        """
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        program, given = self._programs.for_batch(names, feed)
        if program.key not in self._tiers:
            self._load(program)
        answers = self._take_step(program, given)
        results: dict[str, Tensor | None] = {TRAIN: None}
        for name in program.fetches:
            device, value = program.partition.fetches[name]
            results[name] = answers[device].tensors[value] if device else given[value].clone()
        found = [results[name] for name in names]
        return found[0] if isinstance(fetches, str) else found

    def partition(self, fetches: str | Sequence[str], feed: Any = None) -> Partition:
        """How the graph of these fetches is cut, for batches like `feed` (or the first one)."""
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        return self._programs.for_batch(names, feed, checked=False)[0].partition

    def wire_bytes(self) -> WireBytes:
        """What the last step sent from device to device, edge by edge, and what it would have sent without narrowing.

        Empty before the first step.
        """
        return WireBytes(()) if self._sent is None else sent_in_step(*self._sent)

    @property
    def last_tier(self) -> str:
        """ "inductor" when all segments of the programs in use run compiled."""
        tiers = {tier for devices in self._tiers.values() for segments in devices.values() for tier in segments}
        return "inductor" if tiers == {"inductor"} else "eager"

    # -- variables -----------------------------------------------------------------------------------------------

    def read_all(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Copies of the values of these variables, or of all."""
        wanted = [v.name for v in self.graph.variables] if names is None else list(names)
        by_home: dict[str, list[str]] = {}
        for name in wanted:
            by_home.setdefault(self._home(name), []).append(name)
        answers = self._workers.ask({d: Message("read", {"names": n}) for d, n in by_home.items()}, self._timeout_s)
        return {name: answers[self.homes[name]].tensors[name] for name in wanted}

    # -- inside --------------------------------------------------------------------------------------------------

    def _home(self, name: str) -> str:
        if name not in self.homes:
            raise FetchError(f"no variable is called {name!r}. {did_you_mean(name, list(self.homes))}")
        return self.homes[name]

    def _write(self, values: Mapping[str, Tensor]) -> None:
        waiting = list(values.items())
        while waiting:  # a part at a time: a worker has a message twice in its memory for a moment
            part: dict[str, dict[str, Tensor]] = {}
            size = 0
            while waiting and (not part or size + waiting[-1][1].nbytes <= _LARGEST_MESSAGE_BYTES):
                name, value = waiting.pop()
                size += value.nbytes
                part.setdefault(self.homes[name], {})[name] = value
            self._workers.ask({d: Message("write", {}, tensors) for d, tensors in part.items()}, self._timeout_s)

    def _load(self, program: Program) -> None:
        partition = program.partition
        transport = choose(partition.edges, self._transport)
        base = self._workers.directory / f"program-{program.key}"
        meeting = base / "meeting"
        meeting.mkdir(parents=True, mode=0o700)
        messages = {}
        for number, (device, each) in enumerate(partition.programs.items()):
            directory = base / str(number)
            save_program(each, partition.edges, directory)
            messages[device] = Message(
                "program",
                {
                    "key": program.key,
                    "directory": str(directory),
                    "meeting": str(meeting),
                    "transport": transport,
                    "devices": list(partition.programs),
                    "compile": self._compile,
                    "timeout_s": self._timeout_s,
                },
            )
        compiling = self._compile == "inductor"  # before the first step
        self._workers.ask(messages, _COMPILE_TIMEOUT_S if compiling else self._timeout_s)
        self._tiers[program.key] = {}

    def _take_step(self, program: Program, given: Mapping[str, Tensor]) -> dict[str, Message]:
        self._step += 1
        self._stale = self._stale or bool(program.graph.updates)
        fields = {
            "key": program.key,
            "step": self._step,
            "timeout_s": self._timeout_s,
            "timeline": self.watch_time,
        }
        messages = {
            device: Message("step", fields, {name: given[name] for name in each.feeds})
            for device, each in program.partition.programs.items()
        }
        # A device may wait for another as long as that, and then has to say so.
        try:
            answers = self._workers.ask(messages, self._timeout_s + 2.0)
        except MillraceError:
            self.close()  # some devices have updated their variables, and some have not
            raise
        is_first = not self._tiers[program.key]
        for device, answer in answers.items():
            self._tiers[program.key][device] = answer.fields["tiers"]
            for line in answer.fields["said"]:
                self._say(f"{device}: {line}")
        self._sent = program.partition, [answer.fields["sent"] for answer in answers.values()]
        if is_first and any(edge.codec for edge in program.partition.edges):
            self._say(f"between the devices: {self.wire_bytes()}")
        if self.watch_time:
            times = {device: answer.fields["times"] for device, answer in answers.items()}
            self.timeline = Timeline(program.graph, program.partition, times, self.wire_bytes())
        return answers
