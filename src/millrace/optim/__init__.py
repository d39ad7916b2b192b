"""Update rules as pure functions, learning-rate schedules, clipping: the part of the graph that trains."""

from __future__ import annotations

from millrace.optim.average import averages_in
from millrace.optim.base import Rule, State, Update
from millrace.optim.clip import clip_by_global_norm, global_norm
from millrace.optim.constructors import adagrad, adam, adamw, lion, momentum, nesterov, rmsprop, sgd
from millrace.optim.optimizer import Group, Optimizer
from millrace.optim.schedule import Constant as constant
from millrace.optim.schedule import Cosine as cosine
from millrace.optim.schedule import Exponential as exponential
from millrace.optim.schedule import InverseSquareRoot as inverse_square_root
from millrace.optim.schedule import Linear as linear
from millrace.optim.schedule import Piecewise as piecewise
from millrace.optim.schedule import Schedule
from millrace.optim.schedule import StepDecay as step_decay
from millrace.optim.schedule import Warmup as warmup

__all__ = [
    "Group",
    "Optimizer",
    "Rule",
    "Schedule",
    "State",
    "Update",
    "adagrad",
    "adam",
    "adamw",
    "averages_in",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "exponential",
    "global_norm",
    "inverse_square_root",
    "linear",
    "lion",
    "momentum",
    "nesterov",
    "piecewise",
    "rmsprop",
    "sgd",
    "step_decay",
    "warmup",
]
