"""What the driver of a run over parameter servers does next: a state machine without I/O, clocks or tensors.

It is in three layers: what is known of members and told them (`pool_members`), who holds which shard and who its copy
(`pool_shards`), and here who is a worker and works at what. What it builds on:

- A copy that takes the place of its shard has all that was acknowledged.
- A worker whose shard was lost asks the next one again what was open. A worker that is lost is forgotten with all that
  it had not said it pushed: that is given to another. In sync mode the shards count a slice once.

Checked for all orders of events on a small scale by tests/replicas/test_pool.py.
"""

from __future__ import annotations

from dataclasses import replace

from millrace.errors import WorkerError
from millrace.replicas.pool_events import Done, FlushWanted, PoolCommand, PoolEvent, Sizes, Wanted, WriteWanted
from millrace.replicas.pool_shards import PoolShards
from millrace.replicas.pool_state import (
    ENDING,
    FLUSH,
    FREE,
    LEAVING,
    ROLE,
    SHARD,
    SPARE,
    UP,
    WORK,
    WORKERS,
    Member,
    Step,
    Work,
)
from millrace.replicas.protocol import Expect, Fields, Joined, Lost, ReadWanted, Resized, Said


class Pool(PoolShards):
    """The deciding half of the driver. All attributes are immutable values, or dicts and lists of such.

    steps: those in flight, by number. queue: what of them nobody works at. repeats: how many batches or slices were
    given out again. dropped: how many pushes came too late to count. flushing: whether workers are to push all they
    have.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.steps: dict[int, Step] = {}
        self.queue: list[Work] = []
        self.repeats = self.dropped = 0
        self.flushing = False
        self._expected: dict[str, str] = {}

    @property
    def room(self) -> int:
        """For how many batches there are workers now."""
        return len(self._eligible()) - len(self.queue) if self._all_up() and not self.flushing else 0

    @property
    def complete(self) -> bool:
        """Whether all shards, their copies, workers and spares are there and ready."""
        workers = len(self._of(FREE, WORK, FLUSH)) == self.sizes.workers
        return self._all_up() and self._copied() and workers and len(self._of(SPARE)) >= self.sizes.spares

    def work_of(self, name: str) -> Work | None:
        """The slice that a process computes, or that its group does."""
        member = self.members.get(name)
        return member.work if member else None

    def start(self) -> list[PoolCommand]:
        """What to do before the first event."""
        self._settle()
        return self._taken()

    def handle(self, event: PoolEvent) -> list[PoolCommand]:
        """What to do now, in this order.

        Raises: WorkerError when something is wanted out of turn, or a member says what cannot be.
        """
        if self.failed:
            return []
        match event:
            case Joined(member):
                self.starting -= 1
                self.members[member] = Member()
                self._story(f"{member} has joined")
            case Lost(member, why):
                self._lost(member, why)
            case Said(member, kind, fields):
                self._said(member, kind, fields)
            case Wanted(step, slices, needed):
                self._want(step, slices, needed)
            case FlushWanted():
                self.flushing = bool(self.steps)
            case ReadWanted():
                self._ask_all("read")
            case WriteWanted():
                self._ask_all("write")
            case Resized(workers):
                self.sizes = replace(self.sizes, workers=workers)
                self._story(f"{workers} workers from now on")
        self._settle()
        return self._taken()

    # -- events ---------------------------------------------------------------------------------------------------

    def _want(self, step: int, slices: int, needed: int) -> None:
        if self.asked or step in self.steps or (self.sizes.sync and self.steps):
            raise WorkerError(
                f"Step {step} was asked for while {', '.join(map(str, self.steps)) or self.asked} was not done. Give "
                "one step at a time in sync mode, and none while the variables are read or written."
            )
        self.steps[step] = Step(slices, needed)
        self.queue += [(step, slice_) for slice_ in range(slices)]
        self.touched = True
        self._story(f"step {step} of {slices} slices is wanted")

    def _ask_all(self, what: str) -> None:
        if self.steps or self.asked:
            raise WorkerError(f"A {what} of all variables was asked for while steps {list(self.steps)} are in flight.")
        self.asked, self.answered = what, {}
        self._story(f"{what} of all variables is wanted")

    def _lost(self, name: str, why: str) -> None:
        member = self.members.pop(name, None)
        if member is None:
            self.starting -= 1
            self._story(f"{name} was started and never joined: {why}")
        else:
            self._story(f"{name} was lost, doing {member.doing!r}, with {list(member.holds)}: {why}")
            self._give_back(member)
            for shard in range(self.sizes.servers):
                self._lost_of_shard(shard, name, why)
        if member is None or member.doing != LEAVING:
            self._count_loss(f"{name}: {why}")

    def _give_back(self, member: Member) -> None:
        again = [work for work in member.holds if self._is_open(work) and work not in self.queue]
        self.repeats += len(again)
        self.queue = sorted([*again, *self.queue])

    def _said(self, name: str, kind: str, fields: Fields) -> None:
        member = self.members.get(name)
        ending = member is not None and member.doing in (ENDING, LEAVING)
        if member is None or (ending and kind not in ("copied", "uncopied")):  # these say what its copy is worth
            self._story(f"dropped {kind!r} of {name}: it is gone, or going")
        elif member.doing in (SHARD, ENDING):
            self._shard_said(name, kind, fields)
        elif (kind, member.doing) == ("ready", ROLE):
            self._set(name, replace(member, doing=FREE, clock=self._slowest()))
        elif (kind, member.doing) == ("computed", WORK):
            self._story(f"{name} has computed {member.work}")
        elif (kind, member.doing) in (("done", WORK), ("flushed", FLUSH)):
            self._done(name, member, fields)
        elif kind == "shard_lost" and member.doing in WORKERS:
            place = self.places[fields["shard"]]
            if place.state == UP and place.address == fields["address"]:
                self._shard_silent(name, fields["shard"], fields["why"])
        else:
            raise WorkerError(
                f"{name} says {kind!r} ({dict(fields)}), and the driver takes it for {member.doing!r}. They disagree "
                "on what came before; please report both logs."
            )

    def _done(self, name: str, member: Member, fields: Fields) -> None:
        pushed = [(step, slice_) for step, slice_ in fields["pushed"]]
        holds = tuple(work for work in member.holds if work not in pushed)
        done = member.clock + (member.doing == WORK)
        self._set(name, replace(member, doing=FREE, work=None, holds=holds, clock=done))
        self.dropped += fields["late"]
        for step, slice_ in pushed:
            if step in self.steps:
                passed = {shard for shard, version in enumerate(fields["versions"]) if version > step}
                self.steps[step] = self.steps[step].after(slice_, passed)
        self._story(f"{name} has pushed {pushed}")

    # -- deciding -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Everything that follows from where we stand."""
        if self.failed:
            return
        self._report()
        needed = next((step.needed for step in self.steps.values()), 0)
        self._fill_places(needed or 1)
        self._fill_copies()
        self._fill_workers()
        self._start_missing()
        self._dismiss()
        self._send_copies()
        self._go_on_asking()
        if self._all_up() and (not self.sizes.sync or not needed or self._configured(needed)):
            self._hand_out()
        if self.flushing and not self.queue:
            for name in [n for n, m in self.members.items() if m.doing == FREE and m.holds]:
                self._tell(name, "flush")
                self._set(name, replace(self.members[name], doing=FLUSH))
        self._expect()

    def _report(self) -> None:
        for step, found in list(self.steps.items()):
            if found.is_done(self.sizes):
                del self.steps[step]
                self.queue = [work for work in self.queue if work[0] != step]
                self.losses = 0
                self._commands.append(Done(step, tuple(sorted(found.pushed))))
        self.flushing = self.flushing and bool(self.steps)

    def _fill_workers(self) -> None:
        while self._all_up() and len(self._of(*WORKERS)) < self.sizes.workers and (name := self._spare()):
            self._give_role(name, ROLE, {"role": "server_worker", "addresses": [p.address for p in self.places]})

    def _leaving(self) -> list[str]:
        """Workers that are too many: those who came last."""
        return self._of(*WORKERS)[self.sizes.workers :]

    def _dismiss(self) -> None:
        """Who is to leave finishes its batch and pushes what it has, and ends then."""
        for name in self._leaving():
            member = self.members[name]
            if member.doing == FREE and member.holds:
                self._tell(name, "flush")
                self._set(name, replace(member, doing=FLUSH))
            elif member.doing == FREE:
                self._end(name)

    def _hand_out(self) -> None:
        for step, slice_ in list(self.queue):
            free = self._eligible()
            if not free:
                return
            # Who had a slice has memory for its gradients already.
            name = next((n for n in free if self.sizes.sync and self.members[n].slice == slice_), free[0])
            self.queue.remove((step, slice_))
            member, work = self.members[name], (step, slice_)
            self._set(name, replace(member, doing=WORK, work=work, holds=(*member.holds, work), slice=slice_))
            self._tell(name, "batch", {"step": step, "slice": slice_})

    def _expect(self) -> None:
        """Who owes an answer is expected to give it; workers not while a shard is away, for which they wait."""
        owed = {name: text for name in self.members if (text := self._owed(name))}
        for name in {**self._expected, **owed}:
            if name in self.members and self._expected.get(name) != owed.get(name):
                self._commands.append(Expect(name, owed.get(name)))
        self._expected = owed

    def _owed(self, name: str) -> str:
        member = self.members[name]
        if member.doing in WORKERS:
            owed = f"step {member.work[0]}, slice {member.work[1]}" if member.work else member.doing
            return owed if self._all_up() and member.doing != FREE and not self._waits(name) else ""
        return self._owed_of_shard(name)

    # -- small things ---------------------------------------------------------------------------------------------

    def _eligible(self) -> list[str]:
        """Free workers that the bound lets work, those first that have done least."""
        slowest, bound, leaving = self._slowest(), self.sizes.bound, self._leaving()
        staying = [name for name in self._of(FREE) if name not in leaving]
        free = [n for n in staying if bound is None or self.members[n].clock - slowest <= bound]
        return sorted(free, key=lambda name: self.members[name].clock)

    def _slowest(self) -> int:
        return min((self.members[name].clock for name in self._of(FREE, WORK, FLUSH)), default=0)

    def _is_open(self, work: Work) -> bool:
        step = self.steps.get(work[0])
        return step is not None and work[1] not in step.pushed
