"""What the progress display prints, where, and how often."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
import torch
from rich.console import Console

from millrace.train.progress import Progress, View, format_duration, format_rate


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


class Value:
    """A scalar that counts its reads, as each would wait for a device."""

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def frames(console: Console) -> list[str]:
    """The states of the bar, one after the other, without control codes."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(console))
    return [frame.strip() for frame in re.split(r"[\r\n]+", plain) if frame.strip()]


def test_a_terminal_shows_step_epoch_time_left_values_and_rates() -> None:
    console, clock = terminal(), Clock()
    with Progress(100, epochs=4, console=console, clock=clock) as progress:
        for step in range(1, 21):
            clock.now_s += 0.25
            values = {"loss": torch.tensor(1.0 / step, requires_grad=True), "accuracy": 0.5}
            progress.update(step, values, examples=32, epoch=1)
    (last,) = frames(console)[-1:]
    bar = "━━┄┄┄┄┄┄┄┄"
    assert last == f"step 20/100  epoch 1/4 {bar} 0:20 left  loss 0.05  4 steps/s  accuracy 0.5  128 examples/s"


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_gets_one_line_with_the_most_wanted_first(width: int) -> None:
    console, clock = terminal(width), Clock()
    with Progress(1000, console=console, clock=clock) as progress:
        for step in range(1, 4):
            clock.now_s += 1.0
            progress.update(step, {"loss": 0.1234, **{f"long_name_{n}": 1.0 for n in range(1, 20)}})
    assert all(len(frame) <= width for frame in frames(console))
    line = "step 3/1000 ┄┄┄┄┄┄┄┄┄┄ 16:37 left  loss 0.1234  1 steps/s  long_name_1 1  long_name_2 1"
    assert frames(console)[-1] == line[: width - 1] + "…"


def test_values_are_read_only_when_drawn_and_drawing_is_limited() -> None:
    for console, duration_s, most in ((terminal(), 2.0, 22), (pipe(), 35.0, 5)):
        clock, value = Clock(), Value(0.5)
        with Progress(100_000, console=console, clock=clock) as progress:
            for step in range(1, 10_001):
                clock.now_s += duration_s / 10_000
                progress.update(step, {"loss": value})
        assert 2 < value.reads <= most


def test_elsewhere_a_plain_line_comes_now_and_then_and_at_the_end() -> None:
    console, clock = pipe(), Clock()
    with Progress(60, console=console, clock=clock) as progress:
        for step in range(1, 61):
            clock.now_s += 0.5
            progress.update(step, {"loss": 2.0}, examples=10)
            if step == 30:
                progress.message("compiled in 3.2 s [inductor], swapped in at step 30")
    lines = printed(console).splitlines()
    assert "\x1b" not in printed(console)
    assert lines[0] == "step 1/60  loss 2"  # what it took says nothing of the others
    assert lines[-1] == "step 60/60  0:30 taken  loss 2  2 steps/s  20 examples/s"
    assert lines.count("compiled in 3.2 s [inductor], swapped in at step 30") == 1
    assert len(lines) == 5  # at 0.5, 10.5, 20.5 and 30 s, and the message


def test_a_message_stands_above_the_bar_on_a_terminal() -> None:
    console, clock = terminal(), Clock()
    with Progress(10, console=console, clock=clock) as progress:
        clock.now_s += 1
        progress.update(1, {"loss": 1.0})
        thread = threading.Thread(target=progress.message, args=("compiled in 3.2 s [inductor]",))
        thread.start()
        thread.join()
        clock.now_s += 1
        progress.update(2, {"loss": 1.0})
    shown = frames(console)
    at = shown.index("compiled in 3.2 s [inductor]")
    assert 0 < at < len(shown) - 1
    assert shown[-1].startswith("step 2/10")


def test_everything_goes_to_stderr_and_nothing_when_off(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2) as progress:
        progress.update(1, {"loss": 1.0})
        print("a result")
        progress.message("a message")
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert captured.err.startswith("step 1/2")
    assert "a message\n" in captured.err
    value = Value(1.0)
    with Progress(2, enabled=False) as progress, progress.paused():
        progress.update(1, {"loss": value})
        progress.message("a message")
    assert capsys.readouterr() == ("", "")
    assert value.reads == 0


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    console = pipe()
    with Progress(2, console=console) as progress:
        console.file.close()
        progress.update(1, {"loss": 1.0})
        progress.message("a message")


def test_the_rate_leaves_out_pauses_and_the_steps_before_a_resume() -> None:
    console, clock = pipe(), Clock()
    with Progress(1000, first_step=500, console=console, clock=clock) as progress:
        for step in range(501, 521):
            clock.now_s += 0.5
            progress.update(step)
        with progress.paused():
            clock.now_s += 600
        clock.now_s += 0.5
        progress.update(521)
    assert printed(console).splitlines()[-1] == "step 521/1000  4:00 left  2 steps/s"


def test_the_rate_leaves_out_going_back_to_a_checkpoint() -> None:
    console, clock = pipe(), Clock()
    with Progress(1000, console=console, clock=clock) as progress:
        for step in range(1, 401):
            clock.now_s += 0.5
            progress.update(step)
        progress.go_back(300)
        clock.now_s += 60  # new processes
        progress.update(301)
        for step in range(302, 321):
            clock.now_s += 0.5
            progress.update(step)
    assert printed(console).splitlines()[-1] == "step 320/1000  5:40 left  2 steps/s"


def test_an_error_passes_through_and_the_terminal_is_restored() -> None:
    console = terminal()
    with pytest.raises(ValueError, match="x"), Progress(2, console=console):
        raise ValueError("x")
    assert printed(console).count("\x1b[?25l") == printed(console).count("\x1b[?25h") == 1  # the cursor is back


def test_a_call_that_draws_nothing_costs_little() -> None:
    progress = Progress(10**9, console=pipe())
    values = {"loss": torch.tensor(1.0)}
    progress.update(1, values)
    start_s = time.perf_counter()
    for step in range(2, 10_002):
        progress.update(step, values, examples=64)
    assert (time.perf_counter() - start_s) / 10_000 < 20e-6


def test_texts() -> None:
    assert View(3).counter() == "step 3"
    assert View(3, elapsed_s=3723.4).detail() == "1:02:03 taken"
    assert View(3, total_steps=9).detail() == ""
    assert View(3, values={"loss": float("nan")}).detail() == "0:00 taken  loss nan"
    assert [format_rate(rate) for rate in (0.01234, 4.5678, 312.4, 999.9, 19_876, 1.2e6)] == [
        "0.0123",
        "4.57",
        "312",
        "1k",
        "19.9k",
        "1.2M",
    ]
    assert [format_duration(s) for s in (0.4, 59.6, 3600, 360_000)] == ["0:00", "1:00", "1:00:00", "100:00:00"]
