"""Imported by members of a run: whoever first finds the file that $DIES_IN_UPDATE names dies in its update.

By then its gradients are in the sums of all others, and these have had the time to commit the step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

from torch import Tensor

from millrace.replicas.replica import Replica

_commit = Replica.commit


def _or_die(self: Replica, means: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        os.unlink(os.environ["DIES_IN_UPDATE"])
    except FileNotFoundError:
        return _commit(self, means, others)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


Replica.commit = _or_die  # type: ignore[method-assign]
