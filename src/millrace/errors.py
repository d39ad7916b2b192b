"""The one exception tree.

    MillraceError
    ├── TraceError            a step function cannot become a graph: names the user's line and the way out
    ├── GraphError            a graph breaks an invariant, or a graph file is damaged
    ├── FetchError            an unknown fetch or variable name
    ├── FeedError             a batch does not fit what the graph was traced for (shape, dtype, labels out of range)
    ├── PlacementError        a graph cannot be placed: hints contradict, memory is too small, a cluster lacks something
    ├── WorkerError           a worker process died, or did not answer within its time
    │   └── VariablesLostError    all processes that held some variables are lost: the last checkpoint can still serve
    ├── CompileError          a piece could not be compiled (never fatal under "tiered": the piece stays eager)
    ├── CheckpointError       a checkpoint cannot be written, is damaged, or belongs to another model
    │   └── DamagedCheckpointError  a file of it is missing, truncated or altered: an older one can still serve
    ├── DataError             a data set is empty, ends early, or holds something unreadable
    ├── StepError             a step failed while it ran (an operator refused its inputs): names the node and the line
    │   └── OutOfMemoryError      a process had too little memory for it
    ├── NonFiniteError        a value became NaN or infinite; names the first node that made it
    ├── RunDirectoryError     a run directory is in use, or holds something else
    └── SettingError          a setting has the wrong name or type

Every message says who, what was expected, what was got and what to do. Every exception survives pickling
(its only constructor argument is its message), so that it can cross processes.
"""

from __future__ import annotations

import difflib


class MillraceError(Exception):
    """Base of everything that millrace raises on purpose."""


class TraceError(MillraceError):
    """A step function cannot become a graph."""


class GraphError(MillraceError):
    """A graph breaks an invariant, or a graph file is damaged."""


class FetchError(MillraceError, KeyError):
    """An unknown fetch or variable name."""

    # KeyError prints the repr of its argument, which would show "\\n" for line ends.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class FeedError(MillraceError, ValueError):
    """A batch does not fit what the graph was traced for."""


class PlacementError(MillraceError, ValueError):
    """A graph cannot be placed on a cluster: hints contradict, memory is too small, a cluster lacks something."""


class WorkerError(MillraceError, RuntimeError):
    """A worker process died, or did not answer within its time; the message names it and what it was to do."""


class VariablesLostError(WorkerError):
    """All processes that held some of the variables are lost; the last checkpoint can still serve."""


class CompileError(MillraceError):
    """A piece of a graph could not be compiled."""


class CheckpointError(MillraceError):
    """A checkpoint cannot be written, is damaged, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, truncated or altered; an older checkpoint can still serve."""


class DataError(MillraceError, ValueError):
    """A data set is empty, ends early, or holds something unreadable."""


class StepError(MillraceError, RuntimeError):
    """A step failed while it ran; the message names the node, the module and the user's line."""


class OutOfMemoryError(StepError):
    """A process had too little memory for its part of a step."""


class NonFiniteError(MillraceError, ArithmeticError):
    """A value became NaN or infinite; the message names the first node that made it."""


class RunDirectoryError(MillraceError):
    """A run directory is in use by another run, or holds something else."""


class SettingError(MillraceError, ValueError):
    """A setting has a wrong name or a wrong type."""


def did_you_mean(name: str, known: list[str]) -> str:
    """A sentence that suggests the nearest known names, or lists them all when none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(sorted(known)[:12]) + (", …" if len(known) > 12 else "")
    return f"Known: {shown}." if known else "There are none."
