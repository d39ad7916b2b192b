"""Transfer: begin with the features of another run, and see what a task reaches without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from millrace.errors import SettingError
from millrace.train.fit import fit
from millrace.zoo.base import Facts, Task
from millrace.zoo.run import find_run, open_run, total_steps


def take_over(model: nn.Module, run: str, alike: str, readout: str = "readout.") -> None:
    """Give a model all weights of a run's model but the readout's, as that one would predict: averaged.

    Args:
        model: whose weights are changed.
        run: as on the command line: a path, a name, or "latest".
        alike: the settings that must be those of the run, for the message.
        readout: what the names of the weights begin with that stay as they are.

    Raises:
        SettingError: there is no such run, or its network is another.
    """
    found = open_run(find_run(run), "cpu")
    features = {name: value for name, value in found.model.state_dict().items() if not name.startswith(readout)}
    own = model.state_dict()
    if any(name not in own or own[name].shape != value.shape for name, value in features.items()):
        raise SettingError(
            f"transfer_from={run!r}: the run {found.path} has another network. Give this one the same settings {alike}."
        )
    model.load_state_dict({**own, **features})


def trained_alone(task: Task[Any], facts: Facts, device: str) -> dict[str, float]:
    """Train a fresh model of a task to its end, beside the run that is going on, and evaluate it on the test data.

    Args:
        task: with its settings.
        facts: of its data.
        device: such as "cpu".
    """
    data, settings = task.data(facts), task.settings
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = task.model(facts)
    steps = total_steps(settings, data)
    fit(
        model,
        data.train,
        loss=task.loss,
        optimizer=task.optimizer(model, steps),
        device=device,
        steps=steps,
        seed=settings.seed,
        precision=settings.precision,
        compile=settings.compile,
        run_dir=False,
        progress=False,
    )
    return task.evaluate(model.eval(), data.test)
