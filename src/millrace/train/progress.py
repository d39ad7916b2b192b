"""What a person watches while a run goes: a bar on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, SupportsFloat

from rich.console import Console
from rich.live import Live
from rich.text import Text

from millrace.train.metrics import ThroughputMeter, read_scalar

_BAR_INTERVAL_S = 0.1
_BAR_WIDTH = 10  # with a loss, a rate and the time left it makes 80 columns
_LINE_INTERVAL_S = 10.0


class Progress:
    """Shows how far a run is. A context manager; `update` is cheap enough for every step.

    Nothing is read from a tensor unless it is drawn right then: at most about ten times a second on a terminal, and
    once in ten seconds elsewhere.

    Args:
        total_steps: None where nobody knows.
        first_step: steps done before (a resumed run); they do not count in the rate.
        epochs: in all, to be shown beside the current one.
        enabled: False shows nothing at all.
        console: where to; None is stderr.
        clock: seconds on a steady clock.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        first_step: int = 0,
        epochs: int | None = None,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._epochs = epochs
        self._clock = clock
        self._display = _choose_display(console or Console(stderr=True)) if enabled else None
        self._step = self._observed_step = self._drawn_step = first_step
        self._examples = 0
        self._has_stepped = False
        self._epoch: int | None = None
        self._values: Mapping[str, SupportsFloat] = {}
        self._start_s = self._next_draw_s = clock()
        self._meter = ThroughputMeter(self._start_s)

    def __enter__(self) -> Progress:
        self._start_s = self._next_draw_s = self._clock()
        self._meter = ThroughputMeter(self._start_s)
        if self._display is not None:
            self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is None:
            return
        try:
            if error is None and self._step != self._drawn_step:
                self._draw(self._clock())  # the last state stays to be read
        finally:
            self._display.close()

    def update(
        self,
        step: int,
        values: Mapping[str, SupportsFloat] | None = None,
        *,
        examples: int = 0,
        epoch: int | None = None,
    ) -> None:
        """Say how far the run is.

        Args:
            step: steps done so far.
            values: loss and metrics by name; None leaves the last ones. Tensors are kept, and read only when drawn.
            examples: how many this call adds.
            epoch: the current one, from 1.
        """
        if self._display is None:
            return
        self._step = step
        self._examples += examples
        if values is not None:
            self._values = values
        if epoch is not None:
            self._epoch = epoch
        now_s = self._clock()
        if not self._has_stepped:  # tracing and the start of processes say nothing of how quick steps are
            self._has_stepped = True
            self._meter.skip_to(now_s)
            self._observed_step, self._examples = step, 0
        if now_s >= self._next_draw_s:
            self._draw(now_s)

    def go_back(self, step: int) -> None:
        """Say that the run goes on from an earlier step."""
        self._step = self._observed_step = step
        self._has_stepped = False

    def message(self, text: str) -> None:
        """Print a line above the bar. Any thread may call this."""
        if self._display is not None:
            self._display.message(text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rate (an evaluation, a checkpoint)."""
        self._observe(self._clock())
        try:
            yield
        finally:
            self._meter.skip_to(self._clock())

    def _observe(self, now_s: float) -> None:
        self._meter.observe(now_s, self._step - self._observed_step, self._examples)
        self._observed_step, self._examples = self._step, 0

    def _draw(self, now_s: float) -> None:
        if self._display is None:
            return
        self._observe(now_s)
        view = View(
            self._step,
            self._total_steps,
            self._epoch,
            self._epochs,
            {name: read_scalar(value) for name, value in self._values.items()},
            self._meter.steps_per_s,
            self._meter.examples_per_s,
            now_s - self._start_s,
        )
        self._display.draw(view)
        self._drawn_step = self._step
        # Counted from the end of the drawing, so that a slow terminal cannot take all the time.
        self._next_draw_s = self._clock() + self._display.interval_s


@dataclass(frozen=True)
class View:
    """What is shown at one moment."""

    step: int
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    steps_per_s: float = 0.0
    examples_per_s: float = 0.0
    elapsed_s: float = 0.0

    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def counter(self) -> str:
        """Step and epoch."""
        text = f"step {self.step}" + (f"/{self.total_steps}" if self.total_steps is not None else "")
        if self.epoch is not None:
            text += f"  epoch {self.epoch}" + (f"/{self.epochs}" if self.epochs is not None else "")
        return text

    def detail(self) -> str:
        """Time, first value, rate, then the rest: a narrow terminal cuts the end off."""
        values = [f"{name} {value:.4g}" for name, value in self.values.items()]
        steps = f"{format_rate(self.steps_per_s)} steps/s" if self.steps_per_s > 0 else ""
        examples = f"{format_rate(self.examples_per_s)} examples/s" if self.examples_per_s > 0 else ""
        return "  ".join(part for part in (self.time(), *values[:1], steps, *values[1:], examples) if part)

    def time(self) -> str:
        """The time left; at the end, or where the total is unknown, the time taken."""
        if self.total_steps is None or self.step >= self.total_steps:
            return f"{format_duration(self.elapsed_s)} taken"
        if self.steps_per_s <= 0:
            return ""
        return f"{format_duration((self.total_steps - self.step) / self.steps_per_s)} left"


def format_rate(rate: float) -> str:
    """Three digits: 0.0123, 4.56, 312, 19.9k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if rate >= size * 0.9995:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.3g}"


def format_duration(duration_s: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Display(Protocol):
    interval_s: float

    def open(self) -> None: ...
    def draw(self, view: View) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def _choose_display(console: Console) -> _Display:
    return _Bar(console) if console.is_terminal and not console.is_dumb_terminal else _Lines(console)


class _Bar:
    """One line on a terminal that is drawn over and over."""

    interval_s = _BAR_INTERVAL_S

    def __init__(self, console: Console) -> None:
        self._console = console
        self._glyphs = ("=", "-") if console.options.ascii_only else ("━", "┄")
        # The bar is on stderr. What a program prints goes above the bar only where that is the same terminal.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())

    def open(self) -> None:
        self._live.start()

    def draw(self, view: View) -> None:
        full, empty = self._glyphs
        filled = round(_BAR_WIDTH * view.fraction())
        line = Text(no_wrap=True, overflow="ellipsis").append(view.counter() + " ")
        if view.total_steps is not None:
            line.append(full * filled, "bar.complete").append(empty * (_BAR_WIDTH - filled), "bar.back").append(" ")
        self._live.update(line.append(view.detail()), refresh=True)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


class _Lines:
    """A line now and then, for logs and pipes."""

    interval_s = _LINE_INTERVAL_S

    def __init__(self, console: Console) -> None:
        self._file = console.file

    def open(self) -> None:
        pass

    def draw(self, view: View) -> None:
        self.message(f"{view.counter()}  {view.detail()}")

    def message(self, text: str) -> None:
        try:
            # One write, so that lines of several threads do not mix.
            self._file.write(text + "\n")
            self._file.flush()
        except (OSError, ValueError):  # nobody reads any more (a closed pipe): no reason to end the training
            pass

    def close(self) -> None:
        pass
