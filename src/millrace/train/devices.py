"""The session that a run trains in: in this process, or divided over devices."""

from __future__ import annotations

from millrace.compile.tiered import Say
from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.partition.placed import Planner
from millrace.place.cluster import Cluster
from millrace.place.placement import Placement, place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import AnySession, PlacedSession
from millrace.runtime.profiling import profile_on
from millrace.runtime.session import Session
from millrace.runtime.workers import ProcessWorkers
from millrace.train.plan import Plan


def session_for(graph: Graph, plan: Plan, say: Say) -> AnySession:
    """A session as the plan wants it.

    Raises: PlacementError when the graph cannot be placed on the devices, or they are not of this machine.
    """
    if plan.devices is None:
        return Session(graph, compile=plan.compile, say=say)
    cluster = plan.devices if isinstance(plan.devices, Cluster) else local_cluster(plan.devices)
    _refuse_distant(cluster)
    fused = plan.compile != "eager"

    def search(whole: Graph) -> Placement:
        profile = (
            None if isinstance(plan.devices, Cluster) else profile_on(workers, cluster.devices, whole, fused=fused)
        )
        found = place(whole, cluster, plan.placement, seed=plan.seed, fused=fused, profile=profile)
        say(f"placed on {len(cluster.devices)} devices: {found.plan.note}")
        return found

    workers = ProcessWorkers(cluster.devices)
    try:
        return PlacedSession(
            graph, Planner(search, fused=fused), workers, microbatches=plan.microbatches, compile=plan.compile, say=say
        )
    except BaseException:
        workers.close()
        raise


def _refuse_distant(cluster: Cluster) -> None:
    """What runs today is CPU workers of one host; a plan can be made for any cluster."""
    hosts = {device.host for device in cluster.devices}
    others = [device.name for device in cluster.devices if device.kind != "cpu"]
    if len(hosts) > 1 or others:
        which = ", ".join(others) or ", ".join(sorted(hosts))
        raise PlacementError(
            f"training runs on CPU workers of one machine, but the cluster has {which}. "
            "`millrace place` shows what such a cluster could do."
        )
