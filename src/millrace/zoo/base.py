"""The one shape of every task: data, model, loss, metric and defaults, in one file.

What training needs to know about the data beyond the settings (a vocabulary, the names of classes) is a task's *facts*:
JSON that is kept in the run's config.json. A model is built from settings and facts alone, so that a run can be
evaluated and used from its directory, without its training data and without pickle.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from millrace.data.batches import Batches, Json
from millrace.graph.training import UpdateRule
from millrace.optim.optimizer import Optimizer
from millrace.train.callbacks import Callback
from millrace.train.evaluation import Evaluator
from millrace.zoo.settings import Settings

S = TypeVar("S", bound=Settings)
Facts: TypeAlias = Mapping[str, Json]
# name -> float [1 or 3, rows, cols], from 0 (black) to 1; films [frames, 1 or 3, rows, cols] become animated PNGs
Pictures: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class TaskData:
    """A task's data in three parts that share no example; training never sees the last."""

    train: Batches
    validation: Batches  # looked at while training goes on
    test: Batches  # looked at once, at the end
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a trained model says about one file."""

    text: str  # for people
    values: Mapping[str, Json]  # for programs
    pictures: Pictures = field(default_factory=dict)  # where people would rather look


class Task(abc.ABC, Generic[S]):
    """A job that one command trains. Its file ends with `TASK = TheClass`; its name is the file's."""

    settings_type: ClassVar[type[Settings]]
    metric: ClassVar[str]  # the evaluated value that tells how good the model is
    better: ClassVar[Literal["min", "max"]] = "max"
    monitor: ClassVar[str | None] = None  # the value of `loss` by which the best checkpoint is told, if not `metric`
    bar: ClassVar[float | None] = None  # of `metric` on the test data: what a run with the defaults should reach

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @classmethod
    def name(cls) -> str:
        """What the task is called on the command line."""
        return cls.__module__.rpartition(".")[2]

    @abc.abstractmethod
    def data(self, facts: Facts | None = None) -> TaskData:
        """Read or make the data; the same settings give the same data in the same parts.

        Args:
            facts: for a run that is resumed or evaluated: those that it began with, to be kept; None for a new run.
        """

    @abc.abstractmethod
    def model(self, facts: Facts) -> nn.Module:
        """A model with fresh weights (torch's random state is seeded before)."""

    def warm_start(self, model: nn.Module) -> None:
        """Change a new run's weights before its first step, such as to another run's (not, unless a task does)."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimize, and metrics: means over the batch, which are shown and logged."""

    @abc.abstractmethod
    def optimizer(self, model: nn.Module, steps: int) -> UpdateRule | Optimizer:
        """The update rule; a run is meant to last `steps` steps in all, for its schedule."""

    def callbacks(self, model: nn.Module, data: TaskData) -> Iterable[Callback]:
        """Hooks into the training loop (none, unless a task needs them)."""
        return ()

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Loss and metrics over all of `batches`: means of what `loss` returns, unless a task measures otherwise."""
        return Evaluator(model, self.loss, precision=self.settings.precision, compile="eager").means(batches.one_pass())

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Something to look at when training is over, such as samples or mistakes; "" for nothing."""
        return ""

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """Something to look at when training is over; it is kept in the run directory, in pictures/."""
        return {}

    @abc.abstractmethod
    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """What the model says about one of a user's files.

        Raises:
            DataError: the file is missing or unreadable.
        """
