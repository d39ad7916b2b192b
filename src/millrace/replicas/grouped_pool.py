"""What the driver of groups of workers over parameter servers does next: a `Pool` whose workers are groups.

To the pool a group is one worker, under a name of its own. Its members are processes on seats, as in a collective run
(`coordinator`): they add up their gradients, and the first of them pushes the sum. What is decided here:

- A group is formed of those of its members that are ready, when nobody has an answer to give of what was before. They
  share the slices of empty seats. Who gets ready later is taken in before the group's next batch.
- When a member of the generation is lost, or says that its collective is broken, the others leave it. The batch is
  given out again, unless the first has said that it pushed it. Other groups do not hear of it.

Checked for all orders of events on a small scale by tests/replicas/test_grouped_pool.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from millrace.replicas.pool import Pool
from millrace.replicas.pool_events import Sizes
from millrace.replicas.pool_state import FREE, ROLE, Member, Work
from millrace.replicas.protocol import Fields
from millrace.replicas.shares import share_slices

SEATED = "seated"  # what a member of a group is doing, as the pool knows it

# Answers that a member of a group can owe.
READY, FORMED, DONE, ABANDONED = "ready", "formed", "done", "abandoned"


@dataclass(frozen=True)
class Group:
    """seats: who sits on each, "" for nobody. generation: the last one. formed: its members in the order of rank, none
    once it is to be left. owes: of a member, the answer that it has not given. pushed: what the first has said to have
    pushed of the batch in work."""

    seats: tuple[str, ...]
    generation: int = -1
    formed: tuple[str, ...] = ()
    owes: Mapping[str, str] = field(default_factory=dict)
    pushed: Fields | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """In the order of their seats."""
        return tuple(name for name in self.seats if name)

    @property
    def ready(self) -> tuple[str, ...]:
        """Those that can be of a generation."""
        return tuple(name for name in self.members if self.owes.get(name) != READY)

    def owing(self, answer: str, *members: str) -> Group:
        """After these were told something."""
        return replace(self, owes=dict(sorted({**self.owes, **dict.fromkeys(members, answer)}.items())))

    def answered(self, member: str) -> Group:
        """After it has answered, or was lost."""
        return replace(self, owes={name: answer for name, answer in self.owes.items() if name != member})


class GroupedPool(Pool):
    """groups: by name; `members` has one of that name for each. generation: the last one of all groups."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.groups: dict[str, Group] = {}
        self.named = 0  # how many groups there were
        self.generation = -1

    def work_of(self, name: str) -> Work | None:
        """See `Pool.work_of`."""
        return super().work_of(self._group_of(name) or name)

    # -- events ---------------------------------------------------------------------------------------------------

    def _lost(self, name: str, why: str) -> None:
        super()._lost(name, why)
        if group := self._group_of(name):
            found = self.groups[group]
            seats = tuple("" if seat == name else seat for seat in found.seats)
            self.groups[group] = replace(found.answered(name), seats=seats)
            if name in found.formed:
                self._leave(group)

    def _said(self, name: str, kind: str, fields: Fields) -> None:
        group = self._group_of(name)
        if not group:
            super()._said(name, kind, fields)
            return
        found = self.groups[group]
        owed = found.owes.get(name)
        if kind == "shard_lost":
            super()._said(group, kind, fields)
        elif kind != READY and fields["generation"] != found.generation:
            self._story(f"dropped {kind!r} of {name}, generation {fields['generation']}: {group} is at another one")
        elif kind == "broken" and name in found.formed:
            self._count_loss(f"the collective of {group}, at {name}: {fields['why']}")
            self._leave(group)
        elif kind == DONE and owed in (DONE, ABANDONED):  # it may not have heard yet that it is to leave
            pushed = fields if fields["pushed"] else found.pushed
            self.groups[group] = replace(found if owed == ABANDONED else found.answered(name), pushed=pushed)
        elif kind == owed:
            self.groups[group] = found.answered(name)
        else:
            self._story(f"dropped {kind!r} of {name}, which owes {owed}")

    def _leave(self, group: str) -> None:
        """Have those who are left of a generation leave it."""
        found = self.groups[group]
        left = [name for name in found.formed if name in found.seats]
        self.groups[group] = replace(found, formed=()).owing(ABANDONED, *left)
        if self.members[group].doing == FREE:
            self._set(group, Member(ROLE))
        self._story(f"generation {found.generation} of {group} is given up; {left} are left of it")
        for name in left:
            self._tell(name, "abandon", {"generation": found.generation})

    # -- deciding -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self.failed:
            return
        while len(self.groups) < self.sizes.workers:
            name, self.named = f"g{self.named}", self.named + 1
            self.groups[name] = Group(("",) * self.sizes.group)
            self._set(name, Member(ROLE))
        self._dismiss()
        for group in self.groups:
            if not self.failed:
                self._advance(group)
        super()._settle()

    def _advance(self, group: str) -> None:
        """Tell the pool what has become of its worker, and form the group where it is not."""
        found = self.groups[group]
        if {FORMED, DONE, ABANDONED} & set(found.owes.values()):
            return
        if found.pushed is not None:
            self.groups[group] = replace(found, pushed=None)
            super()._said(group, "done", found.pushed)
        elif found.formed and self.members[group].doing == ROLE:
            super()._said(group, "ready", {})
        if not found.formed and self.members[group].doing != ROLE:
            self._give_back(self.members[group])
            self._set(group, Member(ROLE))
        idle = self.members[group].doing in (ROLE, FREE)
        if idle and set(found.ready) != set(found.formed) and not self._should_wait(found):
            self._form(group)

    def _should_wait(self, group: Group) -> bool:
        """Whether somebody will soon be ready for whom it is better to wait than to form a smaller group."""
        coming = self.starting > 0 or bool(self._spare())
        first = group.generation < 0 and coming and not self.losses and "" in group.seats
        return not group.formed and (first or READY in group.owes.values())

    def _form(self, group: str) -> None:
        self.generation += 1
        found = self.groups[group]
        formed = found.ready
        self.groups[group] = replace(found, generation=self.generation, formed=formed).owing(FORMED, *formed)
        self._set(group, Member(ROLE))
        self._story(f"{group} is formed of {formed} as generation {self.generation}")
        for rank, name in enumerate(formed):
            told = {"generation": self.generation, "rank": rank, "size": len(formed), "members": formed}
            self._tell(name, "form", told)

    def _dismiss(self) -> None:
        """A group that is too many ends with all its members when it is not at a batch."""
        for group in self._leaving():
            if self.members[group].doing in (ROLE, FREE):
                self._story(f"{group} is not needed any more")
                for name in self.groups.pop(group).members:
                    self._end(name)
                del self.members[group]

    def _fill_workers(self) -> None:
        """Every group gets its first member before any gets its second."""
        leaving = self._leaving()
        empty = [
            (place, group)
            for group, found in self.groups.items()
            for place, seat in enumerate(found.seats)
            if not seat and group not in leaving
        ]
        for place, group in sorted(empty):
            if not self._all_up() or not (name := self._spare()):
                return
            seats = list(self.groups[group].seats)
            seats[place] = name
            self.groups[group] = replace(self.groups[group], seats=tuple(seats)).owing(READY, name)
            role = {"role": "group_worker", "addresses": [place.address for place in self.places]}
            self._give_role(name, SEATED, role)

    def _tell(self, name: str, kind: str, fields: Fields | None = None) -> None:
        """What a group is told, its members are."""
        group = self.groups.get(name)
        if group is None:
            super()._tell(name, kind, fields)
        elif kind == "batch":
            self.groups[name] = group.owing(DONE, *group.formed)
            seats = [group.seats.index(member) for member in group.formed]
            shares = share_slices(seats, self.sizes.group)
            told = {**(fields or {}), "generation": group.generation, "shares": shares}
            for member, slices in zip(group.formed, shares, strict=True):
                super()._tell(member, kind, {**told, "slices": slices})
        else:
            for member in group.members:
                super()._tell(member, kind, fields)

    def _owed(self, name: str) -> str:
        if name in self.groups:
            return ""
        if not (group := self._group_of(name)):
            return super()._owed(name)
        owed, work = self.groups[group].owes.get(name, ""), self.members[group].work
        if not owed or not self._all_up() or self._waits(group):
            return ""
        return ROLE if owed == READY else f"step {work[0] if work else '-'}, {owed}"

    # -- small things ---------------------------------------------------------------------------------------------

    def _group_of(self, name: str) -> str:
        return next((group for group, found in self.groups.items() if name in found.seats), "") if name else ""

    def _total(self) -> int:
        return super()._total() + self.sizes.workers * self.sizes.group  # a member for each group is in it already
