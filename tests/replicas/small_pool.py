"""A driver of parameter servers and its members, small enough that every order of events can be tried.

The driver's deciding half is the real one. Modelled are: channels (in order, each by itself), members that die or get
stuck (they beat, and do nothing more), members that join. The variables of a shard are the set of the pushes that it
has; what shard and copy say to each other is tried by itself in `explore_shards`, so here a push reaches both at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.replicas.explore import Violation
from tests.replicas.small_world import Facts, _plain

from millrace.replicas import pool_events as ev
from millrace.replicas import protocol
from millrace.replicas.pool import Pool


class Process(NamedTuple):
    """life: live, stuck, dead (the driver has not seen it), gone.

    content: of a shard or its copy, None before it has any. follower: who has its copy. addresses: of the shards, as a
    worker knows them. left: which shards the present push is still to reach. waits: for which it waits to be moved.
    Of a member of a group (`small_groups`): generation, rank, size: of the collective that it is in. phase: what it
    does there. slices: of the batch.
    """

    name: str
    life: str = "live"
    inbox: tuple[Any, ...] = ()
    outbox: tuple[Any, ...] = ()
    role: str = ""
    content: frozenset[Any] | None = None
    follower: str = ""
    addresses: tuple[str, ...] = ()
    work: tuple[int, int] | None = None
    unpushed: tuple[tuple[int, int], ...] = ()
    left: tuple[int, ...] = ()
    waits: tuple[int, ...] = ()
    generation: int = -1
    rank: int = 0
    size: int = 0
    phase: str = ""
    slices: tuple[int, ...] = ()


class World(NamedTuple):
    """A state of everything. wishes: how many were made. faults: crashes, members that get stuck, and connections of
    copies that break, still to come. met: collectives to which all have come."""

    driver: int
    processes: tuple[Process, ...] = ()
    expected: frozenset[str] = frozenset()
    starting: int = 0
    named: int = 0
    faults: tuple[int, int, int] = (0, 0, 0)
    wishes: int = 0
    done: tuple[int, ...] = ()
    read: int = 0
    met: frozenset[Any] = frozenset()


@dataclass(frozen=True)
class Scope:
    """What is tried. wishes: events that the driver is given, when it can take them."""

    sizes: ev.Sizes
    wishes: tuple[Any, ...]
    crashes: int = 0
    stuck: int = 0
    breaks: int = 0
    push_every: int = 1
    driver: Callable[[ev.Sizes], Pool] = Pool


class SmallPool:
    """The system to explore."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.drivers: list[Pool] = []
        self.numbers: dict[Any, int] = {}
        self.known: dict[tuple[int, Any], tuple[int, tuple[Any, ...]]] = {}
        self.steps = tuple(wish.step for wish in scope.wishes if isinstance(wish, ev.Wanted))

    def start(self) -> World:
        """All members that were asked for have joined, and nothing else has happened."""
        driver = self.scope.driver(self.scope.sizes)
        commands = driver.start()
        world = World(self._number(driver), faults=(self.scope.crashes, self.scope.stuck, self.scope.breaks))
        world = self._do(world, tuple(commands))
        while world.starting:
            world = self._join(world)
        return world

    def moves(self, world: World) -> Iterator[tuple[str, World, bool]]:
        """See `explore`."""
        driver = self.drivers[world.driver]
        if driver.failed:
            return
        for place, process in enumerate(world.processes):
            if process.life == "live" and not self._may_wait(process):
                hears = self._hears(world, place)
                if hears is not None:  # nothing that others do meanwhile depends on it
                    yield f"{process.name} hears {process.inbox[0].kind}", hears, False
                    yield from self._faults(world, place)
                    return
        if world.starting:
            yield "a member joins", self._join(world), False
        yield from self._wish(world, driver)
        for place, process in enumerate(world.processes):
            if process.outbox:
                event, *rest = process.outbox
                heard = self._put(world, place, process._replace(outbox=tuple(rest)))
                if isinstance(event, protocol.Lost):
                    heard = self._put(world, place, process._replace(life="gone", outbox=()))
                    heard = heard._replace(expected=heard.expected - {process.name})
                yield f"driver hears {event}", self._drive(heard, event), False
            if process.life == "live":
                yield from self._acts(world, place)
                yield from self._faults(world, place)
            elif process.life == "stuck" and process.name in world.expected:
                yield f"{process.name}, stuck, is killed", self._dies(world, place), False

    def ended_well(self, world: World) -> str | None:
        """See `explore`."""
        driver = self.drivers[world.driver]
        if driver.failed:
            return None  # was judged when it failed
        if world.wishes < len(self.scope.wishes) or sorted(world.done) != sorted(self.steps) or driver.asked:
            return f"nothing happens any more: {world.done} are done, {driver.members}, {driver.places}"
        return None

    # -- driver ---------------------------------------------------------------------------------------------------

    def _wish(self, world: World, driver: Pool) -> Iterator[tuple[str, World, bool]]:
        if world.wishes == len(self.scope.wishes):
            return
        wish = self.scope.wishes[world.wishes]
        if isinstance(wish, ev.Wanted):
            can = not driver.asked and (not driver.steps if self.scope.sizes.sync else driver.room > 0)
        else:
            can = not driver.asked and (not driver.steps or isinstance(wish, ev.FlushWanted | protocol.Resized))
        if can:
            yield f"driver wants {wish}", self._drive(world._replace(wishes=world.wishes + 1), wish), False

    def _join(self, world: World) -> World:
        name = f"m{world.named}"
        world = world._replace(
            processes=(*world.processes, Process(name)), starting=world.starting - 1, named=world.named + 1
        )
        return self._drive(world, protocol.Joined(name))

    def _drive(self, world: World, event: Any) -> World:
        key = (world.driver, event)
        if key not in self.known:
            driver = copy.copy(self.drivers[world.driver])
            vars(driver).update({k: v.copy() for k, v in vars(driver).items() if isinstance(v, dict | list)})
            try:
                commands = driver.handle(event)
            except Exception as error:
                raise Violation(f"{type(error).__name__}: {error}") from error
            self.known[key] = self._number(driver), tuple(c for c in commands if not isinstance(c, protocol.Story))
        number, todo = self.known[key]
        return self._do(world._replace(driver=number), todo)

    def _number(self, driver: Pool) -> int:
        driver.losses = 0  # only counted
        key = tuple((name, _plain(value)) for name, value in sorted(vars(driver).items()))
        if key not in self.numbers:
            self.numbers[key] = len(self.drivers)
            self.drivers.append(driver)
        return self.numbers[key]

    def _do(self, world: World, commands: tuple[Any, ...]) -> World:
        for command in commands:
            match command:
                case protocol.Tell(name, kind, fields):
                    place = self._place(world, name)
                    process = world.processes[place]
                    if process.life in ("live", "stuck"):
                        told = protocol.Told(kind, Facts(fields))
                        world = self._put(world, place, process._replace(inbox=(*process.inbox, told)))
                case protocol.StartMembers(count):
                    world = world._replace(starting=world.starting + count)
                case ev.Kill(name):
                    place = self._place(world, name)
                    if world.processes[place].life in ("live", "stuck"):
                        world = self._dies(world, place)
                case protocol.Expect(name, doing):
                    others = world.expected - {name}
                    world = world._replace(expected=others | {name} if doing else others)
                case ev.Done(step):
                    if step in world.done:
                        raise Violation(f"step {step} is done twice")
                    world = world._replace(done=(*world.done, step))
                    self._judge(world, [place.holder for place in self.drivers[world.driver].places])
                case ev.AllRead(members):
                    self._judge(world, members)
                case protocol.Failed(reason):
                    self._judge_failure(world, reason)
        return world

    def _judge(self, world: World, holders: Any) -> None:
        """What is done must be in every shard, as long as its holder lives."""
        sync, needed = self.scope.sizes.sync, {w.step: w.needed for w in self.scope.wishes if isinstance(w, ev.Wanted)}
        for name in holders:
            process = world.processes[self._place(world, name)]
            for step in world.done:
                has = [work for work in process.content or () if work[0] == step]
                if process.life in ("live", "stuck") and len(has) < (needed[step] if sync else 1):
                    raise Violation(f"step {step} is done, and {name} has only {has}")

    def _judge_failure(self, world: World, reason: str) -> None:
        if world.faults == (self.scope.crashes, self.scope.stuck, self.scope.breaks):
            raise Violation(f"the driver gave up without a fault: {reason}")
        for place in self.drivers[world.driver].places:
            living = [p for p in world.processes if p.life == "live" and p.name in (place.holder, place.copy)]
            if not any(p.content is not None for p in living):
                return
        raise Violation(f"the driver gave up although every shard lives: {reason}")

    # -- members --------------------------------------------------------------------------------------------------

    def _may_wait(self, process: Process) -> bool:
        """Whether what others do meanwhile may matter to what a process makes of its next message."""
        return False

    def _hears(self, world: World, place: int) -> World | None:
        """The world after a process has heard the next message; None when there is none that it can hear now."""
        process = world.processes[place]
        if not process.inbox or (process.left and not (process.waits and self._moved_at(process) is not None)):
            return None
        at = self._moved_at(process) if process.left else 0
        assert at is not None
        told = process.inbox[at]
        process = process._replace(inbox=(*process.inbox[:at], *process.inbox[at + 1 :]))
        match told.kind:
            case "role" if told.fields["role"] == "shard":
                content = None if told.fields["copy"] else frozenset()
                process = process._replace(role="shard", content=content)
                return self._say(world, place, process, "ready", {"address": process.name})
            case "role":
                process = process._replace(role="worker", addresses=tuple(told.fields["addresses"]))
                return self._say(world, place, process, "ready", {})
            case "copy":
                return self._attach(world, place, process, told.fields["member"])
            case "copy_lost":
                if process.follower != told.fields["member"]:
                    return self._put(world, place, process)
                fields = {"member": process.follower, "why": "it is lost"}
                return self._say(world, place, process._replace(follower=""), "uncopied", fields)
            case "promote":
                if process.content is None:
                    raise Violation(f"{process.name} is to be a shard, and has nothing")
                return self._say(world, place, process, "promoted", {})
            case "configure" | "read" | "write":
                answer = {"configure": "configured", "read": "read", "write": "written"}[told.kind]
                return self._say(world, place, process, answer, {})
            case "moved":
                shard = told.fields["shard"]
                addresses = list(process.addresses)
                addresses[shard] = told.fields["address"]
                waits = tuple(s for s in process.waits if s != shard)
                return self._put(world, place, process._replace(addresses=tuple(addresses), waits=waits))
            case "batch":
                work = (told.fields["step"], told.fields["slice"])
                process = process._replace(work=work, unpushed=(*process.unpushed, work))
                if len(process.unpushed) < self.scope.push_every:
                    return self._answer(world, place, process, "done", ())
                return self._put(world, place, process._replace(left=tuple(range(self.scope.sizes.servers))))
            case "flush":
                return self._put(world, place, process._replace(work=None, left=tuple(range(self.scope.sizes.servers))))
        raise Violation(f"{process.name} was told {told}")

    def _moved_at(self, process: Process) -> int | None:
        return next((at for at, told in enumerate(process.inbox) if told.kind == "moved"), None)

    def _attach(self, world: World, place: int, process: Process, member: str) -> World:
        target = self._place(world, member)
        other = world.processes[target]
        if other.life != "live":
            return self._say(world, place, process, "uncopied", {"member": member, "why": "it does not answer"})
        world = self._put(world, target, other._replace(content=process.content))
        return self._say(world, place, process._replace(follower=member), "copied", {"member": member})

    def _acts(self, world: World, place: int) -> Iterator[tuple[str, World, bool]]:
        process = world.processes[place]
        if process.follower and world.processes[self._place(world, process.follower)].life != "live":
            lost = process._replace(follower="")
            fields = {"member": process.follower, "why": "it has ended"}
            yield f"{process.name} misses its copy", self._say(world, place, lost, "uncopied", fields), False
        for shard in process.left:
            if shard not in process.waits:
                yield from self._pushes(world, place, shard)

    def _pushes(self, world: World, place: int, shard: int) -> Iterator[tuple[str, World, bool]]:
        process = world.processes[place]
        at = self._place(world, process.addresses[shard])
        holder = world.processes[at]
        what = f"{process.name} pushes to shard {shard}"
        if holder.life != "live":
            fields = {"shard": shard, "address": holder.name, "why": "it does not answer"}
            waiting = process._replace(waits=(*process.waits, shard))
            yield f"{what}, which is away", self._say(world, place, waiting, "shard_lost", fields), False
            return
        copy_at = self._place(world, holder.follower) if holder.follower else None
        if copy_at is not None and world.processes[copy_at].life != "live":
            return  # it is acknowledged when the copy has it, or is known to be lost
        if holder.content is None:
            raise Violation(f"{process.name} pushes to {holder.name}, which has nothing")
        content = holder.content | set(process.unpushed)
        world = self._put(world, at, holder._replace(content=content))
        if copy_at is not None:
            world = self._put(world, copy_at, world.processes[copy_at]._replace(content=content))
        left = tuple(s for s in process.left if s != shard)
        pushed = process._replace(left=left)
        if left:
            yield what, self._put(world, place, pushed), False
        else:
            kind = "done" if process.work else "flushed"
            pushed = pushed._replace(unpushed=())
            yield what, self._answer(world, place, pushed, kind, process.unpushed), False

    def _answer(
        self, world: World, place: int, process: Process, kind: str, pushed: Any, more: Mapping[str, Any] | None = None
    ) -> World:
        versions = []
        for address in process.addresses:
            content = world.processes[self._place(world, address)].content or frozenset()
            complete = [w.step for w in self.scope.wishes if isinstance(w, ev.Wanted)]
            counts = {step: sum(work[0] == step for work in content) for step in complete}
            needed = {w.step: w.needed for w in self.scope.wishes if isinstance(w, ev.Wanted)}
            versions.append(max([0, *(step + 1 for step in complete if counts[step] >= needed[step])]))
        fields = {"pushed": tuple(pushed), "versions": tuple(versions), "late": False, **(more or {})}
        return self._say(world, place, process._replace(work=None), kind, fields)

    # -- faults, and small things ---------------------------------------------------------------------------------

    def _faults(self, world: World, place: int) -> Iterator[tuple[str, World, bool]]:
        crashes, stuck, breaks = world.faults
        process = world.processes[place]
        if crashes:
            yield f"{process.name} dies", self._dies(world._replace(faults=(crashes - 1, stuck, breaks)), place), True
        if breaks and process.follower:
            fewer = world._replace(faults=(crashes, stuck, breaks - 1))
            fields = {"member": process.follower, "why": "the connection broke"}
            alone = process._replace(follower="")
            yield f"{process.name} loses its copy", self._say(fewer, place, alone, "uncopied", fields), True
        if stuck:
            fewer = world._replace(faults=(crashes, stuck - 1, breaks))
            yield f"{process.name} gets stuck", self._put(fewer, place, process._replace(life="stuck")), True

    def _dies(self, world: World, place: int) -> World:
        process = world.processes[place]
        lost = protocol.Lost(process.name, "died")
        dead = process._replace(life="dead", inbox=(), outbox=(*process.outbox, lost), left=(), waits=())
        return self._put(world, place, dead)

    def _say(self, world: World, place: int, process: Process, kind: str, fields: dict[str, Any]) -> World:
        said = protocol.Said(process.name, kind, Facts(fields))
        return self._put(world, place, process._replace(outbox=(*process.outbox, said)))

    def _place(self, world: World, name: str) -> int:
        return next(place for place, process in enumerate(world.processes) if process.name == name)

    def _put(self, world: World, place: int, process: Process) -> World:
        processes = list(world.processes)
        processes[place] = process
        return world._replace(processes=tuple(processes))
