"""A driver, its members and all that lies between them, small enough that every order of events can be tried.

The deciding halves are the real ones. Modelled are: channels (in order, each by itself), a process group, crashes,
members that get stuck, starts that fail. Variables are the tuple of the updates applied to them: (step, slices).

- An all-reduce, and the forming of a group with its broadcast, can succeed at a rank once all ranks of the generation
  have entered it. It can fail at a rank from when some rank is dead, has left or has failed itself. Where both can be,
  both are tried, at every rank by itself.
- What a worker's collective came to lies in a queue before the worker learns of it, and stays there when the worker
  leaves the group meanwhile.
- A dead member's messages arrive before its loss is seen. (That the last ones are lost too is the same, for the driver,
  as a death before they were sent, which is also tried; but for "computed", without which a step lacks results and is
  done all the same.) A stuck member does nothing more; it is killed when the driver
  expects something of it. A frozen one whose beats stop is a dead one to all others, and is in these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from tests.replicas.explore import Name, Violation

from millrace.replicas import coordinator, protocol
from millrace.replicas.coordinator import Coordinator
from millrace.replicas.protocol import NOTHING
from millrace.replicas.worker_state import WorkerState

Variables = tuple[tuple[int, frozenset[int]], ...]


class Entered(NamedTuple):
    """The collective that a member entered last. level: 0 for forming, else the step. out: it is no longer in it."""

    generation: int
    level: int
    slices: frozenset[int]
    variables: Variables
    out: bool = False


class Process(NamedTuple):
    """life: live, stuck, dead (not yet noticed), gone. job: what it is at. waiting: events not yet seen."""

    name: str
    machine: int
    life: str = "live"
    inbox: tuple[Any, ...] = ()
    outbox: tuple[Any, ...] = ()
    job: Any = None
    waiting: tuple[Any, ...] = ()
    entered: Entered = Entered(0, 0, frozenset(), (), True)
    received: Any = None  # what the last collective brought
    computed: tuple[int, tuple[int, ...]] = (0, ())  # the last step computed, and its slices
    variables: Variables | None = None


class World(NamedTuple):
    """A state of everything."""

    driver: int
    processes: tuple[Process, ...]
    group: tuple[str, ...] = ()  # of the newest generation, by rank
    starting: int = 0
    named: int = 0
    expected: frozenset[str] = frozenset()
    faults: tuple[int, int, int] = (0, 0, 0)  # crashes, members that get stuck, glitches: how many more there can be
    arrivals: int = 0  # how many of the started processes can still join; the others fail to start
    wishes: int = 0  # how many of the script's wishes have been made


@dataclass(frozen=True)
class Scope:
    """What is tried.

    wishes: what the driver is asked for one after the other; each waits for the one before it. prompt: a worker learns
    at once what its collective came to, and computes in no time. What this leaves out (messages in between, late news)
    is between the driver and one worker, and tried in the scopes of two. max_losses: after so many losses without a
    step nobody is started any more (with 1: nobody after the first members).
    """

    replicas: int = 2
    spares: int = 0
    crashes: int = 0
    stuck: int = 0
    glitches: int = 0
    arrivals: int = 0
    max_losses: int = 2
    prompt: bool = False
    wishes: tuple[Any, ...] = (protocol.StepWanted(1, (1.0, 1.0)), protocol.StepWanted(2, (1.0, 1.0)))
    driver: Callable[..., Coordinator] = Coordinator
    worker: Callable[[], WorkerState] = WorkerState


class Facts(dict[str, Any]):
    """Fields of a message, which can be hashed."""

    def __init__(self, fields_: protocol.Fields) -> None:
        super().__init__({k: tuple(v) if isinstance(v, list) else v for k, v in fields_.items()})

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


class Machines:
    """Machines by number, so that a state is small and no transition is worked out twice."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.numbers: dict[Any, int] = {}
        self.known: dict[tuple[int, Any], tuple[int, tuple[Any, ...]]] = {}

    def add(self, machine: Any) -> int:
        key = (type(machine), tuple((name, _plain(value)) for name, value in sorted(vars(machine).items())))
        if key not in self.numbers:
            self.numbers[key] = len(self.all)
            self.all.append(machine)
        return self.numbers[key]

    def handle(self, number: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        """The machine afterwards, and its commands without the stories."""
        key = (number, event)
        if key not in self.known:
            machine = copy.copy(self.all[number])
            if isinstance(machine, Coordinator):
                machine.last_loss = ""  # only told in messages
            vars(machine).update({k: v.copy() for k, v in vars(machine).items() if isinstance(v, dict | list)})
            try:
                commands = machine.handle(event)
            except Exception as error:
                raise Violation(f"{type(error).__name__}: {error}") from error
            if not any(isinstance(c, protocol.Story) for c in commands) and isinstance(machine, Coordinator):
                raise Violation(f"{event} leaves no story")
            self.known[key] = self.add(machine), tuple(c for c in commands if not isinstance(c, protocol.Story))
        return self.known[key]


def _plain(value: Any) -> Any:
    """The same as something that can be hashed."""
    if is_dataclass(value):
        return (type(value).__name__, *(_plain(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


class SmallWorld:
    """The system to explore."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.machines = Machines()
        steps = [wish for wish in scope.wishes if isinstance(wish, protocol.StepWanted)]
        self.last_step = steps[-1].step
        self.faultless: Variables = tuple((s.step, frozenset(range(len(s.weights)))) for s in steps)

    def start(self) -> World:
        """The driver has asked for its members, and they have joined: how starts fail is tried with later ones."""
        scope = self.scope
        driver = scope.driver(scope.replicas, spares=scope.spares, max_losses=scope.max_losses)
        world = World(
            0, (), faults=(scope.crashes, scope.stuck, scope.glitches), arrivals=scope.replicas + scope.spares
        )
        commands = tuple(c for c in driver.start() if not isinstance(c, protocol.Story))
        world = self._do_driver(world._replace(driver=self.machines.add(driver)), commands)
        while world.starting:
            world = self._join(world)
        return world._replace(arrivals=scope.arrivals)

    def moves(self, world: World) -> Iterator[tuple[Name, World, bool]]:
        """See `explore`."""
        driver: Coordinator = self.machines.all[world.driver]
        if driver.phase == coordinator.FAILED:
            return
        for place, process in enumerate(world.processes):
            if process.life == "live" and self._has_one_move(process):
                # Nothing that others do meanwhile depends on this move or changes it, so it may as well be now (or the
                # process dies now; what follows from that can come as late as it likes).
                yield from self._process_moves(world, place, process)
                yield from self._faults(world, place, process)
                return
        yield from self._driver_moves(world, driver)
        for place, process in enumerate(world.processes):
            if process.life == "live":
                yield from self._process_moves(world, place, process)
                yield from self._faults(world, place, process)
            elif process.life == "stuck" and process.name in world.expected:
                yield (process.name, "is stuck, and killed"), self._kill(world, place), False

    def ended_well(self, world: World) -> str | None:
        """See `explore`."""
        driver: Coordinator = self.machines.all[world.driver]
        if driver.phase == coordinator.FAILED:
            return None  # was judged when it failed
        if driver.starting != world.starting:
            return f"the driver waits for {driver.starting} starts, and {world.starting} are on the way"
        if driver.reported != self.last_step or world.wishes < len(self.scope.wishes) or driver.read_wanted:
            return f"nothing happens any more, in phase {driver.phase!r}: step {driver.reported}, {driver.members}"
        for process in world.processes:
            if process.life == "live" and process.name in driver.group and process.variables != self.faultless:
                return f"{process.name} ended with {process.variables}"
        return None

    # --- driver -------------------------------------------------------------------------------------------------------

    def _driver_moves(self, world: World, driver: Coordinator) -> Iterator[tuple[Name, World, bool]]:
        for place, process in enumerate(world.processes):
            if process.outbox:
                message, *rest = process.outbox
                heard = self._put(world, place, process._replace(outbox=tuple(rest)))
                if isinstance(message, protocol.Lost):
                    heard = self._put(world, place, process._replace(life="gone", outbox=(), machine=-1))
                    heard = heard._replace(expected=heard.expected - {process.name})
                yield ("driver hears", message), self._drive(heard, message), False
        if world.starting:
            if world.arrivals:
                yield ("a member joins",), self._join(world), False
            else:
                lost = protocol.Lost(f"m{world.named}", "did not start")
                fewer = world._replace(starting=world.starting - 1, named=world.named + 1)
                yield ("a start fails",), self._drive(fewer, lost), False
        if world.wishes < len(self.scope.wishes):
            wish = self.scope.wishes[world.wishes]
            if driver.flight is None and not driver.read_wanted:
                yield ("driver wants", wish), self._drive(world._replace(wishes=world.wishes + 1), wish), False

    def _join(self, world: World) -> World:
        name = f"m{world.named}"
        process = Process(name, self.machines.add(self.scope.worker()))
        world = world._replace(
            processes=(*world.processes, process),
            starting=world.starting - 1,
            named=world.named + 1,
            arrivals=world.arrivals - 1,
        )
        return self._drive(world, protocol.Joined(name))

    def _drive(self, world: World, event: Any) -> World:
        beside = None
        if isinstance(event, tuple):  # a message with what lies beside it
            event, beside = event
        number, commands = self.machines.handle(world.driver, event)
        return self._do_driver(world._replace(driver=number), commands, beside)

    def _do_driver(self, world: World, commands: tuple[Any, ...], beside: Any = None) -> World:
        for command in commands:
            match command:
                case protocol.Tell(name, kind, fields_):
                    place = self._place(world, name)
                    process = world.processes[place]
                    if kind == "form":
                        rank = fields_["rank"]
                        world = world._replace(group=(*world.group[:rank], name) if rank else (name,))
                    if process.life in ("live", "stuck"):
                        told = protocol.Told(kind, Facts(fields_))
                        world = self._put(world, place, process._replace(inbox=(*process.inbox, told)))
                case protocol.StartMembers(count):
                    world = world._replace(starting=world.starting + count)
                case protocol.Stop(name):
                    world = self._kill(world, self._place(world, name))
                    world = world._replace(expected=world.expected - {name})
                case protocol.Expect(name, doing):
                    others = world.expected - {name}
                    world = world._replace(expected=others | {name} if doing else others)
                case protocol.StepDone():
                    self._judge_step(world, command)
                case protocol.VariablesRead(step=step):
                    if beside != self.faultless[:step]:
                        raise Violation(f"{beside} was read as the variables of step {step}")
                case protocol.Failed():
                    self._judge_failure(world, command.reason)
                case _:
                    raise Violation(f"no such command: {command}")
        return self._tidy(world)

    def _judge_step(self, world: World, done: protocol.StepDone) -> None:
        driver: Coordinator = self.machines.all[world.driver]
        reported = [slice_ for slices in done.slices.values() for slice_ in slices]
        for process in world.processes:
            if process.life in ("live", "stuck") and process.name in driver.group:
                if process.variables != self.faultless[: done.step]:
                    raise Violation(f"{done} is reported and {process.name} has {process.variables}")
                if process.computed[0] == done.step and not set(process.computed[1]) <= set(reported):
                    raise Violation(f"{done} lacks what {process.name} had computed and lives to tell")
        if sorted([*reported, *done.missing]) != sorted(self.faultless[done.step - 1][1]):
            raise Violation(f"{done} has slices twice or not at all")
        if done.missing:
            raise Violation(f"{done} has lost results that were on their way")

    def _judge_failure(self, world: World, reason: str) -> None:
        driver: Coordinator = self.machines.all[world.driver]
        for process in world.processes:
            if process.life == "live" and process.variables == self.faultless[: driver.reported]:
                raise Violation(f"the driver gave up ({reason}) although {process.name} has all that was reported")
        if driver.reported == 0 and world.starting:
            raise Violation(f"the driver gave up ({reason}) although there may be new members for a new start")

    # --- workers ------------------------------------------------------------------------------------------------------

    def _has_one_move(self, process: Process) -> bool:
        if self.scope.prompt and (process.waiting or (process.job and process.job[0] == "compute")):
            return True
        return bool(process.inbox) and not process.job and not process.waiting

    def _process_moves(self, world: World, place: int, process: Process) -> Iterator[tuple[Name, World, bool]]:
        at_once = self.scope.prompt and (process.waiting or (process.job and process.job[0] == "compute"))
        if process.inbox and not at_once:
            told, *rest = process.inbox
            if told.kind == "role":
                process = process._replace(variables=() if told.fields["committed"] == 0 else None)
            heard = process._replace(inbox=tuple(rest))
            yield (process.name, "hears", told), self._work(world, place, heard, told), False
        if process.waiting:
            event, *rest = process.waiting
            seen = process._replace(waiting=tuple(rest))
            yield (process.name, "sees", event), self._work(world, place, seen, event), False
        if process.job:
            yield from self._job_moves(world, place, process)

    def _job_moves(self, world: World, place: int, process: Process) -> Iterator[tuple[Name, World, bool]]:
        kind, generation, step, *about = process.job
        idle = process._replace(job=None)
        if kind in ("form", "reduce"):
            can_succeed, can_fail = self._chances(world, process)
            if can_succeed:
                brought = self._brought(world, process)
                event = protocol.Formed(generation) if kind == "form" else protocol.Reduced(generation, step)
                ended = idle._replace(received=brought, waiting=(*process.waiting, event))
                yield (kind, "succeeds at", process.name), self._put(world, place, ended), False
            crashes, stuck, glitches = world.faults
            if can_fail or glitches:
                event = protocol.CollectiveFailed(generation, "a collective failed")
                broken = process.entered._replace(out=True)
                failed = self._put(world, place, idle._replace(entered=broken, waiting=(*process.waiting, event)))
                if not can_fail:
                    failed = failed._replace(faults=(crashes, stuck, glitches - 1))
                yield (kind, "fails at", process.name), failed, not can_fail
            return
        if kind == "compute":
            event, idle = protocol.Computed(generation, step), idle._replace(computed=(step, about[0]))
        else:
            event, idle = protocol.Updated(generation, step), self._written(idle, kind, step)
        yield (process.name, "has done its", kind), self._work(world, place, idle, event), False

    def _chances(self, world: World, process: Process) -> tuple[bool, bool]:
        """Whether the collective that this process is in can succeed here, and whether it can fail."""
        generation, level, *_ = process.entered
        peers = [peer for peer in world.processes if peer.name in world.group]
        if process not in peers or len(peers) < len(world.group):
            return False, True
        entered = [peer.entered for peer in peers if peer.entered.generation == generation]
        if any(other.level > level for other in entered):
            raise Violation(f"others have gone on while {process.name} is in a collective")
        all_in = len(entered) == len(peers) and all(other.level == level for other in entered)
        disturbed = any(other.out for other in entered) or any(peer.life in ("dead", "gone") for peer in peers)
        return all_in, disturbed

    def _brought(self, world: World, process: Process) -> Any:
        kind, _, step, *about = process.job
        peers = {peer.name: peer.entered for peer in world.processes if peer.name in world.group}
        if kind == "form":
            return peers[world.group[about[0]]].variables if about else None
        slices = [slice_ for entered in peers.values() for slice_ in entered.slices]
        if len({entered.variables for entered in peers.values()}) > 1 or len(set(slices)) < len(slices):
            raise Violation(f"the all-reduce of step {step} adds up what does not belong together: {peers}")
        return step, frozenset(slices)

    def _written(self, process: Process, kind: str, step: int) -> Process:
        """The process after its variables were changed."""
        variables = process.received if kind == "adopt" else (*(process.variables or ()), process.received)
        if variables != self.faultless[:step]:
            raise Violation(f"{process.name} has {variables} after step {step}")
        return process._replace(variables=variables, received=None)

    def _work(self, world: World, place: int, process: Process, event: Any) -> World:
        number, commands = self.machines.handle(process.machine, event)
        process = process._replace(machine=number)
        for command in commands:
            process = self._do_work(process, command)
        return self._put(world, place, process)

    def _do_work(self, process: Process, command: Any) -> Process:
        if process.job and not isinstance(command, protocol.Say | protocol.LeaveGroup | protocol.Broadcast):
            raise Violation(f"{process.name} is to {command} while it is at {process.job}")
        match command:
            case protocol.Say(kind, fields_):
                committed = fields_.get("committed", fields_["step"] if kind == "done" else None)
                has = NOTHING if process.variables is None else len(process.variables)
                if committed is not None and committed != has:
                    raise Violation(f"{process.name} says {fields_} and has {process.variables}")
                said = protocol.Said(process.name, kind, Facts(fields_))
                return process._replace(outbox=(*process.outbox, (said, process.variables)))
            case protocol.LeaveGroup(generation):
                if process.job and process.job[0] in ("update", "adopt"):
                    raise Violation(f"{process.name} leaves its group in the middle of an update")
                out = process.entered._replace(out=process.entered.out or process.entered.generation == generation)
                return process._replace(job=None, entered=out, received=None)
            case protocol.FormGroup(generation):
                entered = Entered(generation, 0, frozenset(), process.variables or ())
                return process._replace(job=("form", generation, 0), entered=entered)
            case protocol.Broadcast(generation, source):
                return process._replace(job=("form", generation, 0, source))
            case protocol.ComputeSlices(generation, step, slices):
                return process._replace(job=("compute", generation, step, slices))
            case protocol.AllReduce(generation, step):
                slices = frozenset(process.computed[1])
                entered = Entered(generation, step, slices, process.variables or ())
                return process._replace(job=("reduce", generation, step), entered=entered)
            case protocol.Adopt(generation, step):
                return process._replace(job=("adopt", generation, step))
            case protocol.Update(generation, step):
                return process._replace(job=("update", generation, step))
        raise Violation(f"no such command: {command}")

    # --- faults, and small things -------------------------------------------------------------------------------------

    def _faults(self, world: World, place: int, process: Process) -> Iterator[tuple[Name, World, bool]]:
        crashes, stuck, glitches = world.faults
        if crashes:
            fewer = world._replace(faults=(crashes - 1, stuck, glitches))
            yield (process.name, "dies"), self._kill(fewer, place), True
        if stuck:
            fewer = world._replace(faults=(crashes, stuck - 1, glitches))
            yield (process.name, "gets stuck"), self._put(fewer, place, process._replace(life="stuck")), True

    def _kill(self, world: World, place: int) -> World:
        process = world.processes[place]
        lost = protocol.Lost(process.name, "died")
        rest = Process(process.name, -1, "dead", outbox=(*process.outbox, lost), entered=process.entered)
        return self._put(world, place, rest)

    def _place(self, world: World, name: str) -> int:
        return next(place for place, process in enumerate(world.processes) if process.name == name)

    def _put(self, world: World, place: int, process: Process) -> World:
        return world._replace(processes=(*world.processes[:place], process, *world.processes[place + 1 :]))

    def _tidy(self, world: World) -> World:
        """Without the members that are gone and were not in the newest group."""
        kept = tuple(p for p in world.processes if p.life != "gone" or p.name in world.group)
        return world._replace(processes=kept)
