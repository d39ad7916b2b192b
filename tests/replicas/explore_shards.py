"""All that can happen to workers and the shards they use, in a small scope: every order of messages, one crash.

A world is plain data. Workers push a step to every shard, then fetch the next one from every shard, and so on. Messages
wait in one queue for each direction of each connection; any queue may deliver next. At any moment the process that the
world names as the victim may end: what it has sent may still arrive or not, and then the driver does what it does.
A variable is the list of updates applied to it, each of them the set of pushes in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from millrace.replicas import shard_events as ev
from millrace.replicas.shard_state import ShardState

Queues = dict[tuple[str, str], tuple[Any, ...]]


@dataclass(frozen=True)
class Node:
    """A process with a shard or a copy. content: the keys of every update in order."""

    state: ShardState
    content: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> Any:
        return (_frozen(vars(self.state)), self.content)


@dataclass(frozen=True)
class Worker:
    """doing: "push" or "fetch". waiting: for the answers of these shards. moved: shards it uses at the new address."""

    step: int = 0
    doing: str = "push"
    waiting: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()


@dataclass(frozen=True)
class World:
    workers: tuple[Worker | None, ...]
    nodes: tuple[tuple[Any, Any], ...]  # per shard: numbers of the nodes (shard, copy) in the explorer's table
    queues: tuple[tuple[tuple[str, str], tuple[Any, ...]], ...]
    crash: str = "to come"  # then "unseen", then "seen"
    told: tuple[int, ...] = ()  # shards that were told of a lost worker, or of a new copy
    acked: frozenset[tuple[int, str]] = frozenset()  # (shard, key)
    shown: frozenset[tuple[int, int, Any]] = frozenset()  # (shard, version, content) that workers were let read


@dataclass(frozen=True)
class Sent:
    """What a shard's whole state travels as. node: the number of the shard as it was then."""

    node: int


class Broken(AssertionError):
    """An invariant does not hold; the message has the way there."""


class Explorer:
    """Visits every world that can be reached.

    victim: "worker", "shard", "copy" (of shard 0, since all are alike) or "". make: the state machine to try.
    """

    def __init__(
        self,
        policy: ev.Policy,
        *,
        workers: int = 2,
        shards: int = 2,
        steps: int = 1,
        victim: str = "",
        new_copy: bool = False,
        make: type[ShardState] = ShardState,
    ) -> None:
        self.policy, self.shards, self.steps, self.victim, self.new_copy = policy, shards, steps, victim, new_copy
        self.names = tuple(f"w{number}" for number in range(workers))
        self.make = make
        self.table: list[Node] = []
        self.numbers: dict[Any, int] = {}
        self.known: dict[tuple[int, Any], tuple[int, tuple[Any, ...]]] = {}
        self.visited: dict[World, tuple[World, str] | None] = {}

    def explore(self) -> int:
        """Returns: the number of worlds. Raises: Broken."""
        first = self._start()
        self.visited[first] = None
        pending = [first]
        while pending:
            world = pending.pop()
            self._check(world)
            ended = True
            for name, following in self._moves(world):
                ended = False
                if following not in self.visited:
                    self.visited[following] = (world, name)
                    pending.append(following)
            if ended:
                self._check_end(world)
        return len(self.visited)

    # -- worlds ---------------------------------------------------------------------------------------------------

    def _start(self) -> World:
        nodes = []
        for _ in range(self.shards):
            shard = self._number(Node(self.make(self.policy, self.names), ()))
            shard, (send,) = self._step(shard, ev.CopyGained())
            copy = self._number(Node(self.make(self.policy, is_copy=True), ()))
            copy, (has,) = self._step(copy, ev.Restored(send.snapshot))
            shard, _ = self._step(shard, ev.CopyAcked(has.index))
            nodes.append((shard, copy))
        world = World(tuple(Worker() for _ in self.names), tuple(nodes), ())
        for worker in range(len(self.names)):
            world = self._ask_all(world, worker)
        return world

    def _moves(self, world: World) -> Iterator[tuple[str, World]]:
        for (source, target), messages in world.queues:
            rest = self._put(world, (source, target), messages[1:])
            yield f"{source}->{target}: {messages[0]}", self._deliver(rest, source, target, messages[0])
        if world.crash == "to come" and self.victim:
            yield f"the {self.victim} is killed", self._killed(world)
        if world.crash == "unseen":
            yield from self._driver_acts(world)
        if world.crash == "seen" and self.victim == "worker":
            for shard in set(range(self.shards)) - set(world.told):
                policy = ev.Sync(self.policy.needed - 1 or 1) if isinstance(self.policy, ev.Sync) else self.policy
                told = replace(world, told=tuple(sorted((*world.told, shard))))
                yield f"driver: s{shard} without w0", self._at(told, shard, 0, ev.Configured(policy, self.names[1:]))
        if world.crash == "seen" and self.victim == "shard":
            for number, worker in enumerate(world.workers):
                if worker is not None and 0 not in worker.moved:
                    yield f"driver: w{number} to the new s0", self._move(world, number)
        if world.crash == "seen" and self.victim in ("shard", "copy") and self.new_copy and not world.told:
            yield "driver: a new copy", self._at(replace(world, told=(0,)), 0, 0, ev.CopyGained())

    def _deliver(self, world: World, source: str, target: str, message: Any) -> World:
        shard = int((source if source[0] in "sc" else target)[1])
        if target[0] == "w":
            return self._answered(world, int(target[1]), shard, message)
        place = 0 if target[0] == "s" else 1
        if isinstance(message, Sent):
            node = self.table[message.node]
            copy = self._number(Node(self.make(self.policy, is_copy=True), node.content))
            world = self._with_node(world, shard, 1, copy)
            message = ev.Restored(node.state.snapshot())
        if world.nodes[shard][place] is None:
            return world
        return self._at(world, shard, place, message)

    def _at(self, world: World, shard: int, place: int, event: Any) -> World:
        """A process handles an event, and its commands are carried out."""
        number, commands = self._step(world.nodes[shard][place], event)
        world = self._with_node(world, shard, place, number)
        content = self.table[number].content
        for command in commands:
            match command:
                case ev.Forward(index, entry):
                    world = self._send(world, f"s{shard}", f"c{shard}", ev.Forwarded(index, entry))
                case ev.SendState():
                    world = self._send(world, f"s{shard}", f"c{shard}", Sent(number))
                case ev.AckCopy(index):
                    world = self._send(world, f"c{shard}", f"s{shard}", ev.CopyAcked(index))
                case ev.Ack() | ev.Drop():
                    world = self._send(world, f"s{shard}", command.worker, command)
                case ev.Reply():
                    world = self._send(world, f"s{shard}", command.worker, command)
                    if isinstance(self.policy, ev.Sync):
                        world = replace(world, shown=world.shown | {(shard, command.version, content)})
        return world

    def _step(self, number: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        found = self.known.get((number, event)) if not isinstance(event, ev.Restored) else None
        if found is None:
            node = self.table[number]
            state = _copy(node.state)
            commands = tuple(state.handle(event))
            content = node.content + tuple(tuple(c.keys) for c in commands if isinstance(c, ev.Apply))
            found = self._number(Node(state, content)), commands
            if not isinstance(event, ev.Restored):
                self.known[(number, event)] = found
        return found

    def _number(self, node: Node) -> int:
        if node.key not in self.numbers:
            self.numbers[node.key] = len(self.table)
            self.table.append(node)
        return self.numbers[node.key]

    # -- workers --------------------------------------------------------------------------------------------------

    def _ask_all(self, world: World, number: int) -> World:
        world = self._with_worker(world, number, waiting=tuple(range(self.shards)))
        for shard in range(self.shards):
            world = self._ask(world, number, shard)
        return world

    def _ask(self, world: World, number: int, shard: int) -> World:
        """Send what this worker waits for an answer to; to a lost shard, nobody hears it."""
        worker = world.workers[number]
        lost = shard == 0 and self.victim == "shard" and world.crash != "to come" and 0 not in worker.moved
        if lost:
            return world
        name = f"w{number}"
        push = ev.Pushed(name, worker.step + 1, worker.step, worker.step, slice=number, key=f"{name}.{worker.step}")
        message = push if worker.doing == "push" else ev.FetchWanted(name, worker.step)
        return self._send(world, name, f"s{shard}", message)

    def _answered(self, world: World, number: int, shard: int, message: Any) -> World:
        worker = world.workers[number]
        if worker is None:
            return world
        if isinstance(message, ev.Ack):
            world = replace(world, acked=world.acked | {(shard, f"w{number}.{message.sequence - 1}")})
        kinds = (ev.Ack, ev.Drop) if worker.doing == "push" else (ev.Reply,)
        expected = isinstance(message, kinds) and getattr(message, "sequence", worker.step + 1) == worker.step + 1
        if shard not in worker.waiting or not expected:
            return world
        waiting = tuple(s for s in worker.waiting if s != shard)
        world = self._with_worker(world, number, waiting=waiting)
        if waiting:
            return world
        if worker.doing == "push":
            world = self._with_worker(world, number, doing="fetch", step=worker.step + 1)
        elif worker.step < self.steps:
            world = self._with_worker(world, number, doing="push")
        else:
            return self._with_worker(world, number, doing="done")
        return self._ask_all(world, number)

    def _move(self, world: World, number: int) -> World:
        """A worker is told the new address of shard 0: what the old one sent is lost, and it asks again."""
        name = f"w{number}"
        world = self._put(world, ("s0", name), ())
        world = self._with_worker(world, number, moved=(0,))
        return self._ask(world, number, 0) if 0 in world.workers[number].waiting else world

    # -- crashes --------------------------------------------------------------------------------------------------

    def _killed(self, world: World) -> World:
        world = replace(world, crash="unseen")
        if self.victim == "worker":
            world = replace(world, workers=(None, *world.workers[1:]))
            for shard in range(self.shards):
                world = self._put(world, (f"s{shard}", "w0"), ())
            return world
        place = 0 if self.victim == "shard" else 1
        lost = f"{'sc'[place]}0"
        for (source, target), _ in world.queues:
            if target == lost:
                world = self._put(world, (source, target), ())
        return self._with_node(world, 0, place, None)

    def _driver_acts(self, world: World) -> Iterator[tuple[str, World]]:
        seen = replace(world, crash="seen")
        if self.victim == "worker":
            yield "driver: w0 is lost", seen
            # what it had sent last is lost with it
            for shard in range(self.shards):
                seen = self._put(seen, ("w0", f"s{shard}"), ())
            yield "driver: w0 is lost with what it sent", seen
        elif self.victim == "copy":
            yield "s0 sees its copy lost", self._at(self._put(seen, ("c0", "s0"), ()), 0, 0, ev.CopyLost())
        else:
            seen = self._put(seen, ("s0", "c0"), ())
            seen = self._put(seen, ("c0", "s0"), ())
            seen = self._at(seen, 0, 1, ev.BecomeShard())
            yield "driver: c0 becomes s0", replace(seen, nodes=((seen.nodes[0][1], None), *seen.nodes[1:]))

    # -- what must hold -------------------------------------------------------------------------------------------

    def _check(self, world: World) -> None:
        for shard, places in enumerate(world.nodes):
            acked = {key for s, key in world.acked if s == shard}
            for place, number in enumerate(places):
                if number is None:
                    continue
                node = self.table[number]
                applied = [key for update in node.content for key in update]
                if len(set(applied)) != len(applied):
                    self._fail(world, f"{'sc'[place]}{shard} applied a push twice: {node.content}")
                has = set(applied) | {push.key for push in node.state.staged.values()}
                if not acked <= has:
                    self._fail(world, f"{'sc'[place]}{shard} has lost {acked - has}, which was acknowledged")
        versions: dict[tuple[int, int], Any] = {}
        for shard, version, content in world.shown:
            if versions.setdefault((shard, version), content) != content:
                self._fail(world, f"version {version} of shard {shard} was shown with two contents")

    def _check_end(self, world: World) -> None:
        for number, worker in enumerate(world.workers):
            if worker is not None and worker.doing != "done":
                self._fail(world, f"w{number} waits for ever: {worker}")
        for shard, (first, copy) in enumerate(world.nodes):
            if first is not None and copy is not None:
                one, other = self.table[first], self.table[copy]
                if one.content != other.content or one.state.snapshot() != other.state.snapshot():
                    self._fail(world, f"the copy of s{shard} differs: {one.content} and {other.content}")
        if self.victim != "shard" and self.new_copy and world.nodes[0][1] is None:
            self._fail(world, "there is no new copy")

    def _fail(self, world: World, what: str) -> None:
        story: list[str] = []
        before = self.visited.get(world)
        while before is not None:
            world, move = before
            story.append(move)
            before = self.visited[world]
        raise Broken("\n".join([what, *reversed(story)]))

    # -- plain data -----------------------------------------------------------------------------------------------

    def _send(self, world: World, source: str, target: str, message: Any) -> World:
        waiting = dict(world.queues).get((source, target), ())
        return self._put(world, (source, target), (*waiting, message))

    def _put(self, world: World, queue: tuple[str, str], messages: tuple[Any, ...]) -> World:
        queues = dict(world.queues)
        queues.pop(queue, None)
        if messages:
            queues[queue] = messages
        return replace(world, queues=tuple(sorted(queues.items(), key=lambda item: item[0])))

    def _with_node(self, world: World, shard: int, place: int, number: int | None) -> World:
        nodes = list(world.nodes)
        pair = list(nodes[shard])
        pair[place] = number
        nodes[shard] = (pair[0], pair[1])
        return replace(world, nodes=tuple(nodes))

    def _with_worker(self, world: World, number: int, **changes: Any) -> World:
        workers = list(world.workers)
        worker = workers[number]
        assert worker is not None
        workers[number] = replace(worker, **changes)
        return replace(world, workers=tuple(workers))


def _copy(state: ShardState) -> ShardState:
    """Its own dictionaries; what is in them is never changed."""
    new = object.__new__(type(state))
    vars(new).update({k: dict(v) if isinstance(v, dict) else v for k, v in vars(state).items()})
    return new


def _frozen(fields: dict[str, Any]) -> Any:
    return tuple((k, tuple(sorted(v.items())) if isinstance(v, dict) else v) for k, v in sorted(fields.items()))
