"""A run over several devices: its session, and what the run directory tells of who does what.

placement.json     the device of every group, and what is expected
placement.svg      the step as a graph, coloured by device
timeline.json      one step as expected and as measured, for ui.perfetto.dev
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from millrace.compile.tiered import Say
from millrace.errors import PlacementError
from millrace.graph.draw import picture_of
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.time_chunks import time_chunks
from millrace.graph.picture.svg import to_svg
from millrace.graph.places import Places
from millrace.partition.placed import Planner
from millrace.place.chrome_trace import trace_bytes
from millrace.place.cluster import Cluster
from millrace.place.cluster_file import read_cluster
from millrace.place.placement import Placement, place, search_at_hand
from millrace.place.probe import local_cluster
from millrace.place.summary import as_json, places_of
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.timeline import compared
from millrace.runtime.workers import ProcessWorkers
from millrace.train.callbacks import Callback, RunView
from millrace.train.plan import Devices, Plan
from millrace.train.run_files import encode_json, write_atomically

PLACEMENT, PICTURE, TIMELINE = "placement.json", "placement.svg", "timeline.json"
# The steps whose timeline is written, counted from the start or the resuming; a later one takes the place of the one
# before. The first is for short runs. A step that is compiled while it runs is timed once more when that is over.
_TIMED = (2, 20)
_AFTER_COMPILING = 10


class DeviceRun(Callback):
    """Makes the session of a run over `plan.devices`; as a callback, writes the files above. say: shows a line."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan, self._say = plan, say
        self._fused = plan.compile != "eager"
        self._planner: Planner | None = None
        self._session: PlacedSession | None = None
        self._done = 0  # steps of this session
        self._due = set(_TIMED)
        self._compiled = plan.compile != "tiered"

    def session(self, graph: Graph) -> PlacedSession:
        """A session over worker processes.

        Raises: PlacementError when the graph cannot be placed on the devices, or they are not of this machine.
        """
        plan = self._plan
        assert plan.devices is not None
        cluster = cluster_of(plan.devices, self._say)
        _refuse_distant(cluster)
        chunked = time_chunks(graph, plan.time_chunks)
        if plan.time_chunks > 1 and chunked is graph:
            self._say(f"time_chunks={plan.time_chunks}: nothing in this model recurs over so many steps of time")
        workers = ProcessWorkers(cluster.devices)
        self._planner = Planner(lambda whole: self._search(whole, cluster), fused=self._fused)
        try:
            self._session = PlacedSession(
                chunked,
                self._planner,
                workers,
                microbatches=plan.microbatches,
                transport=plan.transport,
                wire=plan.wire,
                compile=plan.compile,
                say=self._say,
            )
        except BaseException:
            workers.close()
            raise
        return self._session

    def places(self, graph: Graph) -> Places:
        """The devices of a graph of the step, before its batch is divided."""
        return places_of(self._placement, graph)

    def on_start(self, run: RunView) -> None:
        """Write the placement."""
        if run.directory is None or self._session is None:
            return
        graph = self._session.graph
        shown = prune(graph, [name for name in graph.fetches if not name.startswith("gradient/")], graph.updates)
        picture = picture_of(shown, "module", "device", self.places(shown))
        write_atomically(run.directory / PLACEMENT, encode_json(as_json(self._placement)))
        write_atomically(run.directory / PICTURE, to_svg(picture).encode())

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Have the next step timed if it is to be, and write what was timed."""
        session = self._session
        if run.directory is None or session is None:
            return
        if session.timeline is not None:
            self._write_timeline(run.directory / TIMELINE, step)
        self._done += 1
        if not self._compiled and session.last_tier == "inductor":
            self._compiled = True
            self._due.add(self._done + _AFTER_COMPILING)
        session.watch_time = self._done + 1 in self._due

    def _write_timeline(self, path: Path, step: int) -> None:
        assert self._session is not None
        assert self._session.timeline is not None
        expected, measured = compared(self._session.timeline, self._placement, fused=self._fused)
        self._session.timeline = None
        how = "compiled" if self._fused else "eager"
        tier = "compiled" if self._session.last_tier == "inductor" else "eager"
        which = f"step {step}" if self._plan.steps_per_call == 1 else f"a step from {step} on"
        titles = {f"expected ({how})": expected, f"measured: {which} ({tier})": measured}
        write_atomically(path, trace_bytes(titles))

    @property
    def _placement(self) -> Placement:
        assert self._planner is not None
        assert self._planner.placement is not None, "the session places the graph"
        return self._planner.placement

    def _search(self, whole: Graph, cluster: Cluster) -> Placement:
        plan = self._plan
        if not search_at_hand():
            self._say("compiling the search for a placement, once on this machine: up to a minute")
        found = place(whole, cluster, plan.placement, seed=plan.seed, fused=self._fused, wire=plan.wire)
        self._say(f"placed on {len(cluster.devices)} devices: {found.plan.note}")
        return found


def cluster_of(devices: Devices, say: Say) -> Cluster:
    """The devices that a user means.

    Args: devices: a cluster; a cluster file, as a path or as text that ends in ".toml"; otherwise devices of this
        machine, as `local_cluster` takes them. say: as `local_cluster`.

    Raises: PlacementError.
    """
    if isinstance(devices, Cluster):
        return devices
    if isinstance(devices, Path) or (isinstance(devices, str) and devices.endswith(".toml")):
        return read_cluster(Path(devices))
    return local_cluster(devices, say=say)


def _refuse_distant(cluster: Cluster) -> None:
    """What runs today is workers of one host; a plan can be made for any cluster."""
    hosts = sorted({device.host for device in cluster.devices})
    if len(hosts) > 1:
        raise PlacementError(
            f"training runs on the devices of one machine, but the cluster has {', '.join(hosts)}. "
            "`millrace place` shows what such a cluster could do."
        )
