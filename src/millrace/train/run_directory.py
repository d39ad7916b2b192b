"""A run's directory: what was asked, where it ran, what it measured, how far it got; written by one process at a time.

    config.json        the settings
    environment.json   versions, machine, command line
    state.json         running, finished, interrupted or failed; process, step, times
    metrics.jsonl      one JSON object per line
    log.txt            what the run said, with times
    checkpoints/  events/
    placement.json  placement.svg  timeline.json    of a run over several devices (train/devices.py)
    staleness.json     of a run over parameter servers (train/replicas.py)
    lock               held while a run writes here
    stop               somebody has asked the run to stop (train/stop_request.py)

A resumed run writes config.json and environment.json anew; what differed before stays as config.1.json and so on.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsFloat

from millrace.errors import RunDirectoryError
from millrace.train.directory_lock import LOCK_NAME, DirectoryLock
from millrace.train.environment import Json, environment
from millrace.train.metrics_log import MetricsLog, Record, read_metrics
from millrace.train.run_files import encode_config, encode_json, read_json, remove_leftovers, write_keeping_earlier
from millrace.train.run_log import LOG_NAME, RunLog
from millrace.train.run_names import chosen_name
from millrace.train.run_state import STATE_NAME, Outcome, RunState, advanced, ended, read_state, started, write_state
from millrace.train.stop_request import withdraw_stop

_CONFIG, _ENVIRONMENT, _METRICS = "config.json", "environment.json", "metrics.jsonl"
_CHECKPOINTS, _EVENTS = "checkpoints", "events"
# state.json is written last: a directory with only these was being created when its process died.
_BEFORE_STATE = {LOCK_NAME, LOG_NAME, _CONFIG, _ENVIRONMENT, _CHECKPOINTS, _EVENTS}


class RunDirectory:
    """One run's files. `create` gives the one writer; `open` gives any number of readers."""

    def __init__(self, path: Path, lock: DirectoryLock | None = None) -> None:
        """Use `create`, `open` or `latest`."""
        self.path = path
        self.checkpoints = path / _CHECKPOINTS
        self.events = path / _EVENTS
        self._lock = lock
        self.metrics_path = path / _METRICS
        self.log_path = path / LOG_NAME
        self._log = MetricsLog(self.metrics_path)
        self._said = RunLog(self.log_path)

    # ------------------------------------------------------------------ making and finding

    @classmethod
    def create(
        cls,
        root: Path = Path("runs"),
        name: str | None = None,
        config: Mapping[str, Json] | None = None,
        exist: Literal["new", "resume"] = "new",
    ) -> RunDirectory:
        """Take the directory `root/name` for a new run, or take up the run that is in it, and lock it for writing.

        Args:
            root: the directory that holds the runs; made where missing.
            name: of the run; None makes a unique one from `config["task"]` and the time, or, to resume, takes the
                newest run. An absolute path stands for itself.
            config: the settings, kept as config.json; None keeps those of the run that is resumed.
            exist: "new" refuses a directory that holds a run; "resume" needs one.

        Returns:
            The directory, locked until `close`, or until this process ends.

        Raises:
            RunDirectoryError: the directory is in use, holds something else, holds a run (new), holds none (resume),
                or cannot be written.
            SettingError: `config` holds something that JSON cannot say.
        """
        encoded = None if config is None else encode_config(config)
        if exist == "resume":
            path = Path(root) / name if name is not None else cls.latest(root).path
            return cls._take(path, encoded, exist)
        path = _make_directory(Path(root), name, str((config or {}).get("task", "run")))
        return cls._take(path, encoded or b"{}", exist)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Read the run at `path`, running or not. Takes no lock and writes nothing.

        Raises:
            RunDirectoryError: no run is there.
        """
        _require_run(Path(path))
        return cls(Path(path))

    @classmethod
    def latest(cls, root: Path = Path("runs")) -> RunDirectory:
        """Read the run under `root` that was started or resumed last.

        Raises:
            RunDirectoryError: no run is under `root`.
        """
        runs = [cls(path) for path in _runs_under(Path(root))]
        if not runs:
            raise RunDirectoryError(
                f"No run is under {root}: expected directories with a {STATE_NAME}. Train one first."
            )
        return max(runs, key=lambda run: (run.state.started_at, run.path.name))

    @classmethod
    def find(cls, run: str, root: Path = Path("runs")) -> RunDirectory:
        """Read the run that a person means by `run`: a path, a name under `root`, the beginning of one, or "latest".

        Raises:
            RunDirectoryError: none is meant, or several; the message suggests the near names.
        """
        for path in (Path(run), Path(root) / run):
            if (path / STATE_NAME).exists():
                return cls(path)
        if run == "latest":
            return cls.latest(root)
        known = [path.name for path in _runs_under(Path(root))]
        return cls(Path(root) / chosen_name(run, known, f"{run} or {Path(root) / run}"))

    @classmethod
    def all(cls, root: Path = Path("runs")) -> list[RunDirectory]:
        """Read all runs under `root`, by their names."""
        return [cls(path) for path in _runs_under(Path(root))]

    @classmethod
    def _take(cls, path: Path, config: bytes | None, exist: Literal["new", "resume"]) -> RunDirectory:
        if exist == "resume":
            _require_run(path)
        else:
            _refuse_foreign(path)  # before the lock file is put there
        lock = DirectoryLock(path)
        try:
            if exist == "new":
                _refuse_used(path)  # under the lock: what is there now stays as it is
            run = cls(path, lock)
            run._begin(config)
        except BaseException as error:
            lock.release()
            if isinstance(error, OSError):
                raise RunDirectoryError(
                    f"Cannot write in {path}: {error.strerror}. Free some space or permit it, then start again."
                ) from error
            raise
        return run

    def _begin(self, config: bytes | None) -> None:
        remove_leftovers(self.path)
        for directory in (self.checkpoints, self.events):
            directory.mkdir(exist_ok=True)
        if config is not None:
            write_keeping_earlier(self.path / _CONFIG, config)
        write_keeping_earlier(self.path / _ENVIRONMENT, encode_json(environment()))
        self._log.rewind(None)  # a line cut short by a kill must not run into the next one
        withdraw_stop(self.path)  # of a run that ended before it saw it
        earlier = self.state if (self.path / STATE_NAME).exists() else None
        state = started(earlier)
        write_state(self.path, state)
        self.note(f"{'started' if earlier is None else 'resumed'} in process {state.pid} on {state.host}")

    # ------------------------------------------------------------------ reading

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run was started, or last resumed, with."""
        config: dict[str, Any] = read_json(self.path / _CONFIG)
        return config

    @property
    def state(self) -> RunState:
        """How far the run is, read anew at each call; "killed" where its process ended without saying so."""
        return read_state(self.path)

    def read_metrics(self) -> list[Record]:
        """The lines of metrics.jsonl, oldest first: {"step", "time_s", and the values by name}.

        Raises:
            RunDirectoryError: a line before the last is damaged.
        """
        return read_metrics(self.metrics_path)

    # ------------------------------------------------------------------ writing

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append one line to metrics.jsonl.

        Args:
            step: the step after which the values were measured.
            values: by name; tensors are read here, which waits for their device.

        Raises:
            RunDirectoryError: it cannot be written, or this is a reader.
            SettingError: a value is called "step" or "time_s".
        """
        self._require_writer()
        self._log.append(step, values, time.time())

    def rewind(self, step: int) -> int:
        """Go back to `step`, the step of the checkpoint a resumed run goes on from: drop later lines of metrics.

        Returns:
            How many lines were dropped.
        """
        self._require_writer()
        dropped = self._log.rewind(step)
        self.mark(step)
        return dropped

    def mark(self, step: int) -> None:
        """Write into state.json that the run has come to `step` (it is synced to disk: not for every step)."""
        self._require_writer()
        write_state(self.path, advanced(self.state, step))

    def note(self, text: str) -> None:
        """Add a line to log.txt."""
        if self._lock is not None:
            self._said.append(text)

    def note_error(self, error: BaseException) -> None:
        """Add to log.txt why the run ends."""
        self.note("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))

    def close(self, outcome: Outcome, step: int | None = None) -> None:
        """Write how the run ended, and free the directory. Calling it again does nothing.

        Args:
            outcome: "finished" (all steps, or stopped early on purpose), "interrupted" (by a person) or "failed".
            step: the last step; None leaves the last marked one.
        """
        if self._lock is None:
            return
        try:
            state = ended(self.state, outcome, step)
            self.note(f"{outcome} at step {state.step}")
            self._log.close()
            self._said.close()
            write_state(self.path, state)
            with suppress(OSError):  # it does no harm: a run that goes on forgets it, too
                withdraw_stop(self.path)
        finally:
            lock, self._lock = self._lock, None
            lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.note_error(error)
        interrupted = isinstance(error, KeyboardInterrupt)
        self.close("finished" if error is None else "interrupted" if interrupted else "failed")

    def _require_writer(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(
                f"{self.path} is open for reading, or closed: to write, take it with RunDirectory.create(…)."
            )


# ---------------------------------------------------------------------- directories


def _make_directory(root: Path, name: str | None, task: str) -> Path:
    try:
        if name is not None:
            (root / name).mkdir(parents=True, exist_ok=True)
            return root / name
        root.mkdir(parents=True, exist_ok=True)
        while True:
            stem = re.sub(r"[^\w.-]+", "_", task)
            path = root / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    except OSError as error:
        place = root if name is None else root / name
        raise RunDirectoryError(
            f"Cannot make the run directory {place}: {error.strerror}. Permit it, or choose another place."
        ) from error


def _refuse_foreign(path: Path) -> None:
    content = {entry.name for entry in path.iterdir() if ".tmp-" not in entry.name}
    if not content or STATE_NAME in content or (LOCK_NAME in content and content <= _BEFORE_STATE):
        return
    raise RunDirectoryError(
        f"{path} is not a run and not empty: it holds {sorted(content)[0]!r}"
        + (f" and {len(content) - 1} more" if len(content) > 1 else "")
        + ". Choose a new or an empty directory."
    )


def _refuse_used(path: Path) -> None:
    if (path / STATE_NAME).exists():
        state = read_state(path)
        raise RunDirectoryError(
            f"{path} already holds a run ({state.status} at step {state.step}). "
            f"Resume it with --resume {path} (exist='resume'), or choose another directory."
        )


def _require_run(path: Path) -> None:
    if not (path / STATE_NAME).exists():
        found = "a directory without one" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise RunDirectoryError(f"No run is at {path}: expected a directory with a {STATE_NAME}, got {found}.")


def _runs_under(root: Path) -> list[Path]:
    return [state.parent for state in sorted(root.glob(f"*/{STATE_NAME}"))]
