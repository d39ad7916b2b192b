"""Training: `fit`, the estimator, callbacks, early stopping, and what a run leaves behind."""

from __future__ import annotations

from millrace.train.callbacks import Callback
from millrace.train.early_stopping import EarlyStopping
from millrace.train.estimator import Estimator
from millrace.train.evaluation import Evaluator
from millrace.train.fit import fit
from millrace.train.metrics import accuracy
from millrace.train.model import Model
from millrace.train.result import Result
from millrace.train.run_directory import RunDirectory

__all__ = ["Callback", "EarlyStopping", "Estimator", "Evaluator", "Model", "Result", "RunDirectory", "accuracy", "fit"]
