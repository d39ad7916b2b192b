"""Running graphs: the session, looking at tensors in flight, checkpoints and weights."""

from __future__ import annotations

from millrace.runtime.checkpoint import Checkpoint, Checkpoints
from millrace.runtime.session import Session
from millrace.runtime.weights import load_weights, save_weights

__all__ = ["Checkpoint", "Checkpoints", "Session", "load_weights", "save_weights"]
