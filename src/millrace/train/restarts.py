"""Going back to the last checkpoint when all who held some variables are lost: how often, and at what cost."""

from __future__ import annotations

from millrace.errors import WorkerError

MOST_FROM_ONE_CHECKPOINT = 3


class Restarts:
    """Counts them. A run that loses its variables again and again before it writes another checkpoint gets nowhere.

    count: of all. lost_updates: steps that had been done and are not in the checkpoints that were gone back to.
    """

    def __init__(self) -> None:
        self.count = 0
        self.lost_updates = 0
        self._from_step = -1
        self._in_a_row = 0

    def note(self, step: int, saved_step: int, why: BaseException) -> str:
        """Note that a run at `step` goes back to `saved_step`. Returns: what to tell of it.

        Raises: WorkerError when it went back there too often.
        """
        reason = str(why).partition("\n")[0]
        self._in_a_row = self._in_a_row + 1 if saved_step == self._from_step else 1
        self._from_step = saved_step
        if self._in_a_row > MOST_FROM_ONE_CHECKPOINT:
            raise WorkerError(
                f"it went back to step {saved_step} {MOST_FROM_ONE_CHECKPOINT} times, and lost its variables each time "
                "before it wrote another. Look at why the processes end, or save more often (checkpoint_every=…); then "
                "go on with resume=True."
            )
        self.count += 1
        self.lost_updates += step - saved_step
        return (
            f"{reason}\n{step - saved_step} updates since step {saved_step} were lost; "
            f"the run goes on from the checkpoint of step {saved_step} with new processes."
        )
