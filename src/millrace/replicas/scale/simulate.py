"""Run a job in thought, on any number of workers."""

from __future__ import annotations

from millrace.errors import SettingError
from millrace.replicas.scale.asynchronous import AsynchronousRun
from millrace.replicas.scale.collective import collective_run
from millrace.replicas.scale.events import Setup
from millrace.replicas.scale.job import Failures, Job, Network, Stragglers
from millrace.replicas.scale.outcome import Outcome
from millrace.replicas.scale.synchronous import SynchronousRun
from millrace.replicas.scale.ways import Asynchronous, Collective, Hybrid, Synchronous, Way

UNBOUNDED = 10**12  # servers that are never what one waits for


def simulate(
    job: Job,
    network: Network,
    workers: int,
    servers: int,
    way: Way,
    seed: int = 0,
    steps: int = 200,
    *,
    stragglers: Stragglers | None = None,
    failures: Failures | None = None,
) -> Outcome:
    """What a job would do on that many machines.

    What is not in it: several cards or levels of switches, transfers that overlap a worker's own computation, servers
    that are unequal or die, packets.

    servers: that the variables are divided over evenly; a `Collective` has none. steps: updates where workers wait for
    each other, otherwise computations of each worker, in the mean. stragglers: the defaults of `Stragglers` if None.
    The same arguments give the same outcome.

    Raises: SettingError where a number of machines or steps makes no sense.
    """
    if workers < 1 or steps < 1:
        raise SettingError(f"a simulation needs 1 worker and 1 step or more, got {workers} and {steps}.")
    if servers < 1 and not isinstance(way, Collective):
        raise SettingError(f"{way} needs 1 server or more, got {servers}.")
    setup = Setup(job, network, workers, servers, steps, seed, stragglers or Stragglers(), failures or Failures())
    match way:
        case Collective():
            return collective_run(setup, way)
        case Synchronous():
            return SynchronousRun(setup, way).run()
        case Asynchronous():
            return AsynchronousRun(setup, way).run()
        case Hybrid():
            if workers % way.group_size:
                raise SettingError(f"{workers} workers do not divide into groups of {way.group_size}.")
            return AsynchronousRun(setup, way).run()
