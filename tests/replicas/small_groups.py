"""`small_pool` with workers that are groups: their members meet in collectives, and the first of them pushes.

A collective succeeds at a rank only when all ranks have come to it. When one of them has died or left, it may fail at
any other that has not seen it succeed, or keep it waiting until it is told to abandon.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.replicas.explore import Violation
from tests.replicas.small_pool import Process, Scope, SmallPool, World

FORMING, IN, REDUCING, PUSHING, BROKEN = "forming", "in", "reducing", "pushing", "broken"


class SmallGroups(SmallPool):
    """The system to explore. formed: whether it begins when all groups are."""

    def __init__(self, scope: Scope, *, formed: bool = False) -> None:
        super().__init__(scope)
        self.formed = formed

    def start(self) -> World:
        """See `SmallPool.start`."""
        world = super().start()
        while self.formed:
            onward = [after for name, after, fault in self.moves(world) if not fault and "wants" not in name]
            if not onward:
                break
            world = onward[0]
        return world

    def _may_wait(self, process: Process) -> bool:
        return process.phase in (FORMING, REDUCING)

    def _hears(self, world: World, place: int) -> World | None:
        process = world.processes[place]
        told = process.inbox[0] if process.inbox else None
        if told is None or process.left or told.kind not in ("form", "batch", "abandon"):
            if told is not None and not process.left and told.kind == "role" and told.fields["role"] == "group_worker":
                process = process._replace(
                    role="member", addresses=tuple(told.fields["addresses"]), inbox=process.inbox[1:]
                )
                return self._say(world, place, process, "ready", {})
            return super()._hears(world, place)
        process, fields = process._replace(inbox=process.inbox[1:]), told.fields
        if told.kind == "abandon":
            if fields["generation"] != process.generation:
                raise Violation(f"{process.name}, in {process.generation}, is to abandon {fields['generation']}")
            if process.phase in (FORMING, REDUCING):
                broken = {"generation": process.generation, "why": "it was abandoned"}
                world = self._say(world, place, process, "broken", broken)
                process = world.processes[place]
            free = process._replace(phase="", work=None, slices=(), generation=-1)
            return self._say(world, place, free, "abandoned", {"generation": process.generation})
        if told.kind == "form":
            if process.phase not in ("", IN):
                raise Violation(f"{process.name} is to form a group and is {process.phase}")
            formed = {"generation": fields["generation"], "rank": fields["rank"], "size": fields["size"]}
            return self._arrive(world, place, process._replace(phase=FORMING, **formed))
        if process.phase != IN or fields["generation"] != process.generation:
            raise Violation(f"{process.name}, {process.phase!r} in {process.generation}, is given {dict(fields)}")
        work = (fields["step"], fields["slice"])
        return self._arrive(world, place, process._replace(phase=REDUCING, work=work, slices=tuple(fields["slices"])))

    def _arrive(self, world: World, place: int, process: Process) -> World:
        world = self._put(world, place, process)
        peers = [p for p in world.processes if (p.generation, p.phase) == (process.generation, process.phase)]
        if len(peers) < process.size:
            return world
        if process.phase == REDUCING:
            slices = sorted(slice_ for peer in peers for slice_ in peer.slices)
            if len({peer.work for peer in peers}) > 1 or slices != list(range(self.scope.sizes.group)):
                raise Violation(f"what is added up is {[(p.name, p.work, p.slices) for p in peers]}")
        return world._replace(met=world.met | {self._meeting(process)})

    def _meeting(self, process: Process) -> Any:
        return process.generation, process.phase, process.work

    def _acts(self, world: World, place: int) -> Iterator[tuple[str, World, bool]]:
        yield from super()._acts(world, place)
        process = world.processes[place]
        if process.phase not in (FORMING, REDUCING):
            return
        if process.inbox and (hears := self._hears(world, place)) is not None:
            yield f"{process.name} hears {process.inbox[0].kind}, {process.phase}", hears, False
        if self._meeting(process) in world.met:
            yield f"{process.name} is through with {process.phase}", self._through(world, place), False
        there = [p for p in world.processes if p.generation == process.generation and p.life == "live"]
        if len([p for p in there if p.phase != BROKEN]) < process.size:
            broken = {"generation": process.generation, "why": "a peer is away"}
            failed = self._say(world, place, process._replace(phase=BROKEN), "broken", broken)
            yield f"the collective fails at {process.name}", failed, False

    def _through(self, world: World, place: int) -> World:
        process = world.processes[place]
        generation = {"generation": process.generation}
        if process.phase == FORMING:
            return self._say(world, place, process._replace(phase=IN), "formed", generation)
        if process.rank:
            return self._answer(world, place, process._replace(phase=IN), "done", (), generation)
        shards = tuple(range(self.scope.sizes.servers))
        assert process.work is not None
        return self._put(world, place, process._replace(phase=PUSHING, left=shards, unpushed=(process.work,)))

    def _answer(self, world: World, place: int, process: Process, kind: str, pushed: Any, more: Any = None) -> World:
        process = process._replace(phase=IN, slices=())
        return super()._answer(world, place, process, kind, pushed, more or {"generation": process.generation})
