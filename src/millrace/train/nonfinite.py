"""Why a loss is not finite: go back to the last checkpoint, repeat the steps since, and look at the bad one closely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from millrace.data.batches import Batches
from millrace.errors import MillraceError
from millrace.graph.graph import TRAIN
from millrace.runtime.checkpoint import VARIABLES, Checkpoints
from millrace.runtime.session import Session

_ADVICE = (
    "  What to do: look at that batch and module; lower the learning rate, warm it up, or clip gradients "
    "(clip_norm=1.0); in bfloat16, try float32."
)


def explain_nonfinite(
    session: Session, checkpoints: Checkpoints | None, batches: Batches, step: int, loss: float, calls: Sequence[Any]
) -> str:
    """A message that names the first node to make a NaN or an infinity.

    The variables have the bad update already. Where there is a checkpoint, the steps since are repeated, and the
    variables (so the user's module, too) are left as they were before the bad step.
    """
    head = f"the loss became {loss} at step {step}"
    try:
        found = _repeat(session, checkpoints, batches, step) if checkpoints is not None else None
    except (MillraceError, RuntimeError, OSError) as error:
        found = None
        head += f" (the steps since the last checkpoint could not be repeated: {error})"
    if found is not None:
        where, first_step = found
        if where:
            when = "" if first_step == step else f", in step {first_step}"
            return (
                f"{head}.\n  First not finite{when}: {where}\n{_ADVICE}\n"
                f"  The model and the checkpoints hold the values from before step {first_step}."
            )
        head += " (it did not when the steps were repeated from the last checkpoint)"
    where = next((text for batch in calls if (text := session.first_nonfinite(batch))), "")
    detail = f"\n  With the variables as they are now: {where}" if where else ""
    return f"{head}.{detail}\n{_ADVICE}"


def _repeat(session: Session, checkpoints: Checkpoints, batches: Batches, step: int) -> tuple[str, int] | None:
    """The first bad node and its step; ("", step) when all is finite this time; None without a checkpoint."""
    checkpoints.wait()
    if not checkpoints.steps():
        return None
    found = checkpoints.load()
    session.restore(found.path / VARIABLES)
    batches.seek(found.extra["position"])
    now = found.step
    for batch in batches.until(batches=step):
        now += 1
        if not bool(torch.isfinite(session.run("loss", batch))) or now == step:
            return session.first_nonfinite(batch), now
        session.run([TRAIN], batch)
    return "", step
