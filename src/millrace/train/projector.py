"""Vectors for TensorBoard's projector: files beside the events of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from millrace.train.callbacks import Callback, RunView
from millrace.train.run_files import write_atomically
from millrace.train.run_state import Outcome

CONFIG, VECTORS, NAMES = "projector_config.pbtxt", "vectors.tsv", "names.tsv"  # the first is TensorBoard's own name


class ShowVectors(Callback):
    """Leaves vectors for TensorBoard's projector in the run directory when training ends.

    Args:
        name: of the table.
        vectors: gives them, [N, D], as they are then.
        labels: N, of the rows.
        most: how many rows, from the first on, are shown.
    """

    def __init__(self, name: str, vectors: Callable[[], Tensor], labels: Sequence[str], most: int) -> None:
        self._name, self._vectors, self._labels, self._most = name, vectors, labels, most

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        if run.directory is not None:
            shown = self._vectors()[: self._most]
            write_projector(run.directory / "events", self._name, shown, self._labels[: self._most])


def write_projector(events: Path, name: str, vectors: Tensor, labels: Sequence[str]) -> None:
    """Have TensorBoard's projector show vectors with a label each.

    Args: events: the directory of a run's events. name: of the table. vectors: [N, D]. labels: N.

    Raises: RunDirectoryError: it cannot be written.
    """
    rows = vectors.detach().cpu().tolist()
    write_atomically(events / VECTORS, "".join("\t".join(f"{x:.5g}" for x in row) + "\n" for row in rows).encode())
    shown = (" ".join(label.split()) or "·" for label in labels)  # a tab or a line end would be another column or row
    write_atomically(events / NAMES, "".join(f"{label}\n" for label in shown).encode())
    table = f"tensor_name: {json.dumps(name)} tensor_path: {json.dumps(VECTORS)} metadata_path: {json.dumps(NAMES)}"
    write_atomically(events / CONFIG, f"embeddings {{ {table} }}\n".encode())
