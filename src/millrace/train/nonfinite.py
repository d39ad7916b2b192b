"""Why a loss or a weight is not finite: go back to the last checkpoint, repeat the steps since, look closely."""

from __future__ import annotations

from typing import Any

import torch

from millrace.data.batches import Batches
from millrace.errors import MillraceError
from millrace.graph.graph import TRAIN
from millrace.graph.signature import Role
from millrace.runtime.checkpoint import VARIABLES, Checkpoints
from millrace.runtime.remote_session import AnySession

_ADVICE = (
    "  What to do: look at that batch and module; lower the learning rate, warm it up, or clip gradients "
    "(clip_norm=1.0); in bfloat16, try float32."
)


def nonfinite_parameter(session: AnySession) -> str | None:
    """The first of the parameters being trained that holds a NaN or an infinity, or None."""
    trained = [v.name for v in session.graph.variables if v.role is Role.PARAMETER and v.name in session.graph.updates]
    if not trained:
        return None
    tensors = [session.variables[name] for name in trained]
    # One wait for the device instead of one for each.
    finite = torch.stack([torch.isfinite(tensor).all().to(tensors[0].device) for tensor in tensors]).tolist()
    return None if all(finite) else trained[finite.index(False)]


def explain_nonfinite(
    session: AnySession, checkpoints: Checkpoints | None, batches: Batches, step: int, what: str, batch: Any = None
) -> str:
    """A message that names the first node to make a NaN or an infinity.

    `what` was found after step `step`, which took `batch`.
    The variables have the bad update already. Where there is a checkpoint, the steps since are repeated, and the
    variables (so the user's module, too) are left as they were before the bad step.
    """
    head = f"{what} at step {step}"
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
    where = session.first_nonfinite(batch) if batch is not None else ""
    detail = f"\n  With the variables as they are now: {where}" if where else ""
    kept = "" if checkpoints is not None else "\n  A run with a run directory (run_dir=…) goes back and finds the node."
    return f"{head}.{detail}\n{_ADVICE}{kept}"


def _repeat(session: AnySession, checkpoints: Checkpoints, batches: Batches, step: int) -> tuple[str, int] | None:
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
        before = {name: tensor.clone() for name, tensor in session.variables.items()}
        loss = session.run([TRAIN, "loss"], batch)[1]
        if now == step or not bool(torch.isfinite(loss)) or nonfinite_parameter(session) is not None:
            for name, tensor in before.items():
                session.assign(name, tensor)
            return session.first_nonfinite(batch), now
    return "", step
