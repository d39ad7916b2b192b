"""One object to train, evaluate, predict and export, for those who like their model in that shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from millrace.data.sources import as_batches
from millrace.graph.training import Loss, UpdateRule
from millrace.runtime.weights import save_weights
from millrace.train.evaluation import Evaluator, only
from millrace.train.fit import fit
from millrace.train.result import Result


class Estimator:
    """A module with its loss and optimizer; `train`, `evaluate`, `predict` and `export_weights` share its weights.

    Thin over `fit`: use that, and `Session`, where this shape is too tight. The same program runs on a CPU and on a
    GPU; only `device` differs.

    Args:
        model: any `nn.Module`; it is moved to `device` and trained in place.
        loss, optimizer: as for `fit`.
        predict: `predict(model, batch) -> tensor, or nest of tensors` whose first axis is the batch's. By default the
            model is called with the batch, or with the first entry where batches are tuples (inputs and labels).
        device: None leaves the model where it is.
        settings: defaults for `fit`: `run_dir`, `precision`, `compile`, `seed`, …
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        optimizer: torch.optim.Optimizer | UpdateRule,
        predict: Callable[[Any, Any], Any] | None = None,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> None:
        self.model = model
        self._loss = loss
        self._optimizer = optimizer
        self._device = device
        self._settings = settings
        options = {name: settings[name] for name in ("precision", "compile") if name in settings}
        self._evaluator = Evaluator(model, loss, **options)
        self._predictor = Evaluator(model, predict or _call, **options)

    def train(self, data: Any, *, batch_size: int | None = None, validation: Any = None, **settings: Any) -> Result:
        """Train on `data`; everything that `fit` takes may be given here, over the object's own settings."""
        return fit(
            self.model,
            data,
            loss=self._loss,
            optimizer=self._optimizer,
            batch_size=batch_size,
            validation=validation,
            device=self._device,
            **{**self._settings, **settings},
        )

    def evaluate(self, data: Any, *, batch_size: int | None = None) -> dict[str, float]:
        """Mean loss and metrics over one pass, in evaluation mode, each example counted once.

        Raises: DataError for data that cannot be read.
        """
        return self._evaluator.means(self._pass(data, batch_size))

    def predict(self, data: Any, *, batch_size: int | None = None) -> Any:
        """Predictions for one pass over the data, in its order and in evaluation mode, in main memory.

        Returns: one tensor [examples, ...], or {name: tensor} where a prediction is a nest of tensors.

        Raises: DataError for data that cannot be read.
        """
        parts: dict[str, list[Tensor]] = {}
        for batch in self._pass(data, batch_size):
            for name, value in self._predictor(batch).items():
                parts.setdefault(name, []).append(value.cpu())
        return only({name: _joined(values) for name, values in parts.items()})

    def export_weights(self, path: str | Path) -> None:
        """Write the weights as safetensors, under the module's own names.

        Raises: CheckpointError when the file cannot be written.
        """
        save_weights(self.model, path)

    def _pass(self, data: Any, batch_size: int | None) -> Any:
        if self._device is not None:
            self.model.to(self._device)
        return as_batches(data, batch_size=batch_size, shuffle=False, drop_last=False).one_pass()


def _call(model: Any, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _joined(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values[0].ndim == 0 else torch.cat(values)
