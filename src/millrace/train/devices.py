"""The session that a run trains in: in this process, or divided over devices."""

from __future__ import annotations

from pathlib import Path

from millrace.compile.tiered import Say
from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.graph.passes.time_chunks import time_chunks
from millrace.partition.placed import Planner
from millrace.place.cluster import Cluster
from millrace.place.cluster_file import read_cluster
from millrace.place.placement import Placement, place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import AnySession, PlacedSession
from millrace.runtime.profiling import profile_on
from millrace.runtime.session import Session
from millrace.runtime.workers import ProcessWorkers
from millrace.train.plan import Devices, Plan


def session_for(graph: Graph, plan: Plan, say: Say) -> AnySession:
    """A session as the plan wants it.

    Raises: PlacementError when the graph cannot be placed on the devices, or they are not of this machine.
    """
    if plan.devices is None:
        return Session(graph, compile=plan.compile, say=say)
    cluster, described = cluster_of(plan.devices)
    _refuse_distant(cluster)
    fused = plan.compile != "eager"

    def search(whole: Graph) -> Placement:
        profile = None if described else profile_on(workers, cluster.devices, whole, fused=fused)
        found = place(whole, cluster, plan.placement, seed=plan.seed, fused=fused, profile=profile, wire=plan.wire)
        say(f"placed on {len(cluster.devices)} devices: {found.plan.note}")
        return found

    chunked = time_chunks(graph, plan.time_chunks)
    if plan.time_chunks > 1 and chunked is graph:
        say(f"time_chunks={plan.time_chunks}: nothing in this model recurs over so many steps of time")
    workers = ProcessWorkers(cluster.devices)
    try:
        return PlacedSession(
            chunked,
            Planner(search, fused=fused),
            workers,
            microbatches=plan.microbatches,
            transport=plan.transport,
            wire=plan.wire,
            compile=plan.compile,
            say=say,
        )
    except BaseException:
        workers.close()
        raise


def cluster_of(devices: Devices) -> tuple[Cluster, bool]:
    """The devices that a user means, and whether it is the user who describes what they can do.

    Args: devices: a cluster; a cluster file, as a path or as text that ends in ".toml"; otherwise devices of this
        machine, as `local_cluster` takes them.

    Raises: PlacementError.
    """
    if isinstance(devices, Cluster):
        return devices, True
    if isinstance(devices, Path) or (isinstance(devices, str) and devices.endswith(".toml")):
        return read_cluster(Path(devices)), True
    return local_cluster(devices), False


def _refuse_distant(cluster: Cluster) -> None:
    """What runs today is workers of one host; a plan can be made for any cluster."""
    hosts = sorted({device.host for device in cluster.devices})
    if len(hosts) > 1:
        raise PlacementError(
            f"training runs on the devices of one machine, but the cluster has {', '.join(hosts)}. "
            "`millrace place` shows what such a cluster could do."
        )
