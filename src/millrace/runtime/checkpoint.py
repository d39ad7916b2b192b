"""Checkpoints: a whole state every time, whatever happens to the process, the disk or a bit of a file.

    DIRECTORY/step-00000123/variables.safetensors    the tensors
                            extra.json               everything else, as JSON (nothing is ever pickled)
                            manifest.json            format, step, metric, size and sha256 of the two, and of itself

`commit.py` says how such a directory comes to be all at once.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from torch import Tensor

from millrace.errors import CheckpointError, DamagedCheckpointError, SettingError
from millrace.files import beside, make_directory
from millrace.runtime.commit import (
    Digest,
    discard,
    publish,
    recover,
    write_bytes,
    write_failure,
)
from millrace.runtime.manifest import Json, Manifest, decode_manifest, encode_extra, encode_manifest
from millrace.runtime.shard import read_shard, snapshot, verify, write_shard

WriteShard: TypeAlias = Callable[[Path, Mapping[str, Tensor]], Digest]
ReadShard: TypeAlias = Callable[[Path, Digest | None], dict[str, Tensor]]

VARIABLES, EXTRA, MANIFEST = "variables.safetensors", "extra.json", "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step, as it was saved."""

    step: int
    tensors: dict[str, Tensor]  # in main memory
    extra: dict[str, Any]  # what JSON makes of what was saved: a tuple comes back as a list
    metric: float | None
    path: Path  # its directory


def best_of(metrics: Mapping[int, float | None], best: Literal["min", "max"]) -> list[int]:
    """The steps that have a number for a metric, best first; of equal ones the earlier first."""
    known = {step: metric for step, metric in metrics.items() if metric is not None and not math.isnan(metric)}
    return sorted(known, key=lambda step: (known[step] if best == "min" else -known[step], step))


class Checkpoints:
    """The checkpoints of one run in one directory.

    `save` takes a copy of the state and writes it in a background thread. Saving a step again replaces what was saved
    for it; after a kill at any moment one of the two is whole. After every save the newest `keep_last` and the best
    `keep_best` stay, and the one just saved; the others are removed.

    Args: keep_last, keep_best: how many. best: whether a small or a large metric is good. write, read: what puts the
    tensors into a file and takes them out again; `write` must sync the file.
    Raises: SettingError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best: Literal["min", "max"] = "min",
        write: WriteShard = write_shard,
        read: ReadShard = read_shard,
    ) -> None:
        if keep_last < 1 or keep_best < 0 or best not in ("min", "max"):
            raise SettingError(
                "Checkpoints needs keep_last ≥ 1, keep_best ≥ 0 and best 'min' or 'max'; "
                f"got {keep_last=}, {keep_best=}, {best=}."
            )
        self.directory = Path(directory)
        self._keep_last, self._keep_best, self._best = keep_last, keep_best, best
        self._write, self._read = write, read
        self._pending: list[Future[None]] = []  # at most one
        # `wait` keeps the writers apart; the lock does where an interrupt came between a thread's start and its record.
        self._writing = threading.Lock()
        weakref.finalize(self, _report_unseen, self._pending, self.directory)
        recover(self.directory)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Json] | None = None,
        metric: float | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Saves the state after a step; returns as soon as it is copied.

        Waits first for the save before it. The state may be changed as soon as this returns.

        Args: extra: anything that JSON can hold. metric: what `best` judges by. wait: return when it is on the disk.
        Raises: CheckpointError for what cannot be saved, and whatever went wrong with the save before it (then this
        one was not begun: call again).
        """
        if step < 0:
            raise CheckpointError(f"A checkpoint's step is counted from 0; got {step}.")
        content = encode_extra(extra or {})
        self.wait()
        copies = snapshot(tensors)
        judged = None if metric is None else float(metric)
        future: Future[None] = Future()
        job = (future, step, copies, content, judged)
        # No daemon: a program that ends finishes its last checkpoint first.
        threading.Thread(target=self._run, args=job, name=f"save step {step}", daemon=False).start()
        self._pending.append(future)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises: whatever went wrong with it, once.
        """
        for future in list(self._pending):
            wait_for([future])  # an interrupt here leaves the result to be asked for again
            self._pending.remove(future)
            future.result()

    def close(self) -> None:
        """The same as `wait`; leaving a `with` block calls it."""
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that are completely on the disk, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def best(self) -> int | None:
        """The step with the best metric (the earliest of equal ones), or None where no checkpoint has one."""
        ranked = best_of(self._metrics(), self._best)
        return ranked[0] if ranked else None

    def load(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of a step, or the newest good one, every byte verified.

        A save under way is waited for. Without a step, a damaged checkpoint is named in a warning and the one before
        it is taken.

        Raises: CheckpointError when the step is not there or damaged, when no good checkpoint is there, or when it
        belongs to another model.
        """
        wait_for(self._pending)
        steps = self.steps()
        if step is not None:
            if step not in steps:
                there = ", ".join(map(str, steps)) or "none"
                raise CheckpointError(f"{self.directory} has no checkpoint of step {step}. There are: {there}.")
            return self._load(step)
        damages = []
        for candidate in reversed(steps):
            try:
                checkpoint = self._load(candidate)
            except DamagedCheckpointError as error:
                damages.append(str(error))
                continue
            for damage in damages:
                warnings.warn(f"{damage} The checkpoint of step {candidate} is used instead.", stacklevel=2)
            return checkpoint
        if not steps:
            raise CheckpointError(f"{self.directory} has no checkpoint. Name the directory of a run that saved one.")
        raise CheckpointError(
            f"{self.directory} has no good checkpoint:\n  " + "\n  ".join(damages) + "\nBring the files back from a "
            "copy, or start a new run in a new directory."
        )

    def rewind(self, step: int) -> None:
        """Removes the checkpoints after a step: a run that goes back must not find its old future when it resumes.

        Raises: CheckpointError when one cannot be removed.
        """
        self.wait()
        self._discard([later for later in self.steps() if later > step])

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _run(
        self, future: Future[None], step: int, tensors: dict[str, Tensor], extra: bytes, metric: float | None
    ) -> None:
        try:
            with self._writing:
                self._commit(step, tensors, extra, metric)
                self._prune(step)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _commit(self, step: int, tensors: dict[str, Tensor], extra: bytes, metric: float | None) -> None:
        final = self._path(step)
        temporary = beside(final, "tmp")
        try:
            make_directory(self.directory)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                files = {VARIABLES: self._write(temporary / VARIABLES, tensors)}
                files[EXTRA] = write_bytes(temporary / EXTRA, extra)
                write_bytes(temporary / MANIFEST, encode_manifest(Manifest(step, metric, files)))
                publish(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            needed_bytes = sum(tensor.nbytes for tensor in tensors.values()) + len(extra)
            raise write_failure(final, needed_bytes, error) from error

    def _prune(self, saved: int) -> None:
        steps = self.steps()
        kept = {saved, *steps[-self._keep_last :], *best_of(self._metrics(), self._best)[: self._keep_best]}
        self._discard([step for step in steps if step not in kept])

    def _discard(self, steps: list[int]) -> None:
        for step in steps:
            try:
                discard(self._path(step))
            except OSError as error:
                raise CheckpointError(
                    f"{self._path(step)} could not be removed: {error.strerror or error}. The newer checkpoints are "
                    "whole. Remove it by hand, and see who owns the folder."
                ) from error

    def _metrics(self) -> dict[int, float | None]:
        metrics: dict[int, float | None] = {}
        for step in self.steps():
            try:
                metrics[step] = self._manifest(step).metric
            except CheckpointError:
                metrics[step] = None
        return metrics

    def _manifest(self, step: int) -> Manifest:
        path = self._path(step) / MANIFEST
        try:
            manifest = decode_manifest(path, path.read_bytes())
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        if manifest.step != step:
            raise DamagedCheckpointError(f"{path} is of step {manifest.step}: the folder was renamed. Rename it back.")
        return manifest

    def _load(self, step: int) -> Checkpoint:
        path = self._path(step)
        manifest = self._manifest(step)
        verify(path / EXTRA, manifest.files[EXTRA])
        extra = json.loads((path / EXTRA).read_bytes())
        tensors = self._read(path / VARIABLES, manifest.files[VARIABLES])
        return Checkpoint(step, tensors, extra, manifest.metric, path)


def _report_unseen(pending: list[Future[None]], directory: Path) -> None:
    """Says at the end of the program, or of the object, what nobody asked `wait` for."""
    for future in pending:
        if future.done() and (error := future.exception()) is not None:
            warnings.warn(f"The last checkpoint of {directory} was not saved: {error}", stacklevel=1)
