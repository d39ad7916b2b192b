"""The programs of one replica over several devices of its host, which are processes of its own and end with it.

The driver decides what runs where, once for all replicas. A replica keeps the variables; its devices have copies of
those that gradients are computed with, and are given the new values before they compute. So an update, a broadcast or
a fetch from servers knows nothing of devices.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import FeedError
from millrace.graph.graph import Graph
from millrace.partition.pieces import Piece
from millrace.partition.placed import Planner
from millrace.place.cluster import Cluster, Device
from millrace.place.hints import Hints
from millrace.place.placement import Placement, place
from millrace.place.wire import Wire
from millrace.replicas.line import Line
from millrace.runtime.feeds import Key
from millrace.runtime.placed_programs import Programs
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.workers import ProcessWorkers

_SIGN_OF_LIFE_S = 0.5
NEW = "new/"  # begins the fetch of a variable's value after the forward pass


def program_of(gradients: Graph) -> Graph:
    """What a worker runs of the half that makes gradients: it fetches what that would change, and changes nothing."""
    news = {NEW + variable: node for variable, node in gradients.updates.items()}
    return gradients.with_(fetches={**gradients.fetches, **news}, updates={})


@dataclass(frozen=True)
class Devices:
    """What every replica is divided over. microbatches: into how many parts its slice of a batch is."""

    cluster: Cluster
    hints: Hints = field(default_factory=Hints)
    seed: int = 0
    microbatches: int = 1

    def as_fields(self) -> list[dict[str, Any]]:
        """What a replica has to know of them, as JSON can say it; `DividedPrograms` takes it."""
        return [asdict(device) for device in self.cluster.devices]

    def shared_by(self, replicas: int) -> Devices:
        """The same where so many replicas divide the cores of one machine."""
        devices = tuple(replace(d, threads=max(1, d.threads // replicas)) for d in self.cluster.devices)
        return replace(self, cluster=replace(self.cluster, devices=devices))


class Placer:
    """Decides what runs where; programs for slices of other shapes are placed like the first."""

    def __init__(self, devices: Devices, *, compile: str, say: Say) -> None:
        self._devices, self._fused, self._say = devices, compile != "eager", say
        self._planner = Planner(self._search, fused=self._fused)

    def pieces(self, gradients: Graph) -> bytes:
        """The pieces of a program in all forms in which a replica asks for them, as it takes them.

        Raises: PlacementError when it cannot be placed.
        """
        found: list[list[Piece]] = []

        def note(graph: Graph) -> list[Piece]:
            found.append(self._planner(graph))
            return found[-1]

        program = program_of(gradients)
        programs = Programs(program, note, Wire(), 1, "mean", self._say)
        programs.for_batch(tuple(program.fetches), None, checked=False)
        return json.dumps([[asdict(piece) for piece in pieces] for pieces in found]).encode()

    def _search(self, graph: Graph) -> Placement:
        devices = self._devices
        found = place(graph, devices.cluster, devices.hints, seed=devices.seed, fused=self._fused)
        self._say(f"every replica is placed on {len(devices.cluster.devices)} devices: {found.plan.note}")
        return found


class DividedPrograms:
    """Starts the devices, and runs programs over them.

    Args: devices: see `Devices.as_fields`. line: that of the replica's process: its directory is for what the devices
        share, and the driver is told over it that starting goes on.
    """

    def __init__(self, devices: Sequence[Mapping[str, Any]], line: Line, *, compile: str, say: Say) -> None:
        self._compile, self._say = compile, say
        self._graphs: dict[Key, Graph] = {}  # by the shape of a slice
        self._pieces: dict[frozenset[str], list[Piece]] = {}  # by the names of their nodes
        self._session: PlacedSession | None = None
        with _showing_life(line, f"starting {len(devices)} devices"):
            self._workers = ProcessWorkers([Device(**device) for device in devices], base=line.directory)

    def program(self, graph: Graph, variables: Mapping[str, Tensor], pieces: bytes) -> DividedProgram:
        """A program over the devices.

        Args: graph: changes no variable. variables: all that the programs read, looked up at every run. pieces: of
            `Placer.pieces`.
        """
        self._graphs[tuple((feed.spec.shape, feed.spec.dtype) for feed in graph.feeds)] = graph
        for told in json.loads(pieces):
            made = [Piece(each["name"], each["device"], tuple(each["nodes"])) for each in told]
            self._pieces[frozenset(node for piece in made for node in piece.nodes)] = made
        if self._session is None:
            self._session = PlacedSession(
                graph.with_(retrace=self._known),
                lambda part: self._pieces[frozenset(node.name for node in part.nodes)],
                self._workers,
                variables,
                compile=self._compile,
                say=self._say,
            )
        return DividedProgram(graph, self._session, variables)

    def _known(self, batch: Any) -> Graph:
        key: Key = tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(batch))
        if key not in self._graphs:
            raise FeedError(f"no program was given for slices of {key}")
        return self._graphs[key]


class DividedProgram:
    """A program that runs on several devices, with the face of a `Session`."""

    def __init__(self, graph: Graph, session: PlacedSession, variables: Mapping[str, Tensor]) -> None:
        self.graph, self._session, self._variables = graph, session, variables

    def run(self, fetches: Sequence[str], feed: Mapping[str, Tensor] | None) -> list[Tensor]:
        """Run fetches with the variables as they are now.

        Raises: as `PlacedSession.run`. After a WorkerError this process is of no more use.
        """
        self._session.push({variable.name: self._variables[variable.name] for variable in self.graph.variables})
        found: list[Tensor] = self._session.run(fetches, feed)
        return found

    @property
    def last_tier(self) -> str:
        """See `PlacedSession.last_tier`."""
        return self._session.last_tier

    def close(self) -> None:
        """End the devices of all programs."""
        self._session.close()


@contextmanager
def _showing_life(line: Line, doing: str) -> Iterator[None]:
    """While this lasts, the driver sees progress: what is done takes longer than a step, and has a limit of its own."""
    over = threading.Event()

    def show() -> None:
        while True:
            line.progress(doing)
            if over.wait(_SIGN_OF_LIFE_S):
                return

    thread = threading.Thread(target=show, name="millrace-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
