"""Who holds which shard of the variables, and who its copy: the second layer of `pool`'s state machine.

A shard acknowledges a push when its copy has it too, and says "uncopied" to the driver before it goes on without one.
So a copy that is taken to follow has all that was acknowledged.
"""

from __future__ import annotations

from dataclasses import replace

from millrace.errors import WorkerError
from millrace.replicas.pool_events import AllRead, AllWritten, Sizes
from millrace.replicas.pool_members import PoolMembers
from millrace.replicas.pool_state import (
    EMPTY,
    FOLLOWING,
    PROMOTING,
    READY,
    SENDING,
    SHARD,
    STARTING,
    UP,
    WORKERS,
    Place,
)
from millrace.replicas.protocol import Fields


class PoolShards(PoolMembers):
    """Attributes: places: by shard. touched: whether the shards may have other values than the driver. asked: "read" or
    "write" of all shards. answered: who has, by shard."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.places = [Place() for _ in range(sizes.servers)]
        self.touched = False
        self.asked = ""
        self.answered: dict[int, str] = {}

    def _all_up(self) -> bool:
        return all(place.state == UP for place in self.places)

    def _copied(self) -> bool:
        return all(place.copy_state == FOLLOWING for place in self.places) or not self.sizes.copies

    def _waits(self, worker: str) -> bool:
        """Whether it can do nothing before a shard has sent all it has to a copy."""
        return any(worker in place.waiting for place in self.places)

    def _lost_of_shard(self, shard: int, name: str, why: str) -> None:
        place = self.places[shard]
        if place.copy == name:
            self._no_longer_sending(shard, replace(place, copy="", copy_state=EMPTY))
            if place.state == UP and place.copy_state in (SENDING, FOLLOWING):
                self._tell(place.holder, "copy_lost", {"member": name})  # it may be sending to a machine that is gone
        if place.holder != name:
            return
        if place.copy_state == FOLLOWING:
            self.places[shard] = Place(PROMOTING, place.copy, place.copy_address, needed=place.needed)
            self._story(f"{place.copy} is to take the place of shard {shard}")
            self._tell(place.copy, "promote")
        elif self.touched:
            lacking = "its copy was not complete" if self.sizes.copies else "it has no copy"
            self._fail(
                f"shard {shard} of the variables is lost with {name} ({why}), and {lacking}: only the last checkpoint "
                "has its variables.",
                variables_lost=True,
            )
        else:
            if place.copy:
                self._kill(place.copy, "it is the copy of nothing")
            self.places[shard] = Place()

    def _shard_silent(self, worker: str, shard: int, why: str) -> None:
        """A worker has no answer from a shard that is up: it is killed, unless it has something to do first that its
        variables depend on."""
        place = self.places[shard]
        if place.copy_state == SENDING:
            self._story(f"{worker} has no answer from shard {shard}, which is sending all it has to {place.copy}")
            self.places[shard] = replace(place, waiting=(*place.waiting, worker))
        elif worker in place.excused:
            self._story(
                f"{worker} had no answer from shard {shard}, which may have been sending to a copy that is lost"
            )
            self.places[shard] = replace(place, excused=place.excused - {worker})
            self._tell(worker, "moved", {"shard": shard, "address": place.address})
        else:
            self._kill(place.holder, f"{worker} has no connection with it: {why}")

    def _no_longer_sending(self, shard: int, place: Place) -> None:
        """What a place is from now on; who has waited for an answer may ask again."""
        follows = place.copy_state == FOLLOWING
        workers = frozenset(name for name, member in self.members.items() if member.doing in WORKERS)
        self.places[shard] = replace(place, waiting=(), excused=frozenset() if follows else workers)
        for name in place.waiting:
            if name in self.members and place.state == UP:
                self._tell(name, "moved", {"shard": shard, "address": place.address})

    def _shard_said(self, name: str, kind: str, fields: Fields) -> None:
        shard = next(number for number, place in enumerate(self.places) if name in (place.holder, place.copy))
        place = self.places[shard]
        is_holder = name == place.holder
        match kind:
            case "ready" if is_holder:
                self._is_up(shard, replace(place, state=UP, address=fields["address"]))
            case "promoted" if is_holder:
                self._is_up(shard, replace(place, state=UP, needed=0))
            case "ready":
                self.places[shard] = replace(place, copy_state=READY, copy_address=fields["address"])
            case "copied":
                if place.copy == fields["member"]:
                    self._no_longer_sending(shard, replace(place, copy_state=FOLLOWING))
                    self._story(f"{place.copy} follows shard {shard}")
            case "uncopied":
                if place.copy == fields["member"]:
                    self._kill(place.copy, f"it does not follow shard {shard} any more: {fields['why']}")
                    self._no_longer_sending(shard, replace(place, copy="", copy_state=EMPTY))
            case "configured":
                self.places[shard] = replace(place, owes=place.owes - {kind})
            case "read" | "written":
                self.places[shard] = replace(place, owes=place.owes - {kind})
                self.answered[shard] = name
            case _:
                raise WorkerError(f"{name}, which holds shard {shard} or its copy, says {kind!r}, which cannot be.")

    def _is_up(self, shard: int, place: Place) -> None:
        self.places[shard] = place
        self._story(f"shard {shard} is at {place.holder}")
        for name, member in self.members.items():
            if member.doing in WORKERS:
                self._tell(name, "moved", {"shard": shard, "address": place.address})

    def _fill_places(self, needed: int) -> None:
        """Shards get a process; needed: slices that the update of the step in flight waits for."""
        for shard, place in enumerate(self.places):
            if place.state == EMPTY and (name := self._spare()):
                self.places[shard] = Place(STARTING, name, needed=needed)
                self._give_role(name, SHARD, {"role": "shard", "shard": shard, "copy": False, "needed": needed})

    def _fill_copies(self) -> None:
        """Their copies get one when all shards have."""
        if self.sizes.copies and not any(place.state == EMPTY for place in self.places):
            for shard, place in enumerate(self.places):
                if place.state == UP and not place.copy and (name := self._spare()):
                    self.places[shard] = replace(place, copy=name, copy_state=STARTING)
                    role = {"role": "shard", "shard": shard, "copy": True, "needed": place.needed or 1}
                    self._give_role(name, SHARD, role)

    def _send_copies(self) -> None:
        """Have shards send what they hold to copies that are ready for it."""
        for shard, place in enumerate(self.places):
            if place.state == UP and place.copy_state == READY:
                self.places[shard] = replace(place, copy_state=SENDING)
                self._tell(place.holder, "copy", {"address": place.copy_address, "member": place.copy})

    def _go_on_asking(self) -> None:
        """Ask every shard that can be asked; the next holder of one that was lost is asked again."""
        if not self.asked:
            return
        answer = {"read": "read", "write": "written"}[self.asked]
        for shard, place in enumerate(self.places):
            if place.state == UP and shard not in self.answered and answer not in place.owes:
                self.places[shard] = replace(place, owes=place.owes | {answer})
                self._tell(place.holder, self.asked, {"shard": shard})
        if len(self.answered) == self.sizes.servers:
            members = tuple(self.answered[shard] for shard in range(self.sizes.servers))
            self._commands.append(AllRead(members) if self.asked == "read" else AllWritten())
            self.asked, self.answered = "", {}

    def _configured(self, needed: int) -> bool:
        """Whether all shards wait for so many slices; those that do not are told."""
        for shard, place in enumerate(self.places):
            if place.needed != needed:
                self.places[shard] = replace(place, needed=needed, owes=place.owes | {"configured"})
                self._tell(place.holder, "configure", {"needed": needed})
        return not any("configured" in place.owes for place in self.places)

    def _owed_of_shard(self, name: str) -> str:
        return next((place.owed_by(name) for place in self.places if name in (place.holder, place.copy)), "")
