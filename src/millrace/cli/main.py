"""`millrace COMMAND …`: finds the command's file, calls it, and turns what goes wrong into one message and a status.

The command's own file is imported when it is called, so that a broken one leaves the others in order.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from millrace.errors import MillraceError, SettingError, did_you_mean
from millrace.version import __version__

OK, FAILED, USAGE, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 130, 141
TRACEBACK = "MILLRACE_TRACEBACK"

# command -> its module in this folder, and what it does
COMMANDS = {
    "train": ("train", "train a task, or go on with a run"),
    "runs": ("runs", "list the runs, and how each of them goes"),
    "logs": ("logs", "print what a run has said, or follow it"),
    "stop": ("stop", "end a run as Ctrl-C does: it is saved"),
    "resume": ("resume", "go on with a run, as it was"),
    "submit": ("submit", "train a task on a Ray cluster elsewhere"),
    "eval": ("evaluate", "evaluate a run on data that its training never saw"),
    "predict": ("predict", "use a trained model on files"),
    "graph": ("graph", "show one training step as a dataflow graph"),
    "tasks": ("tasks", "list the tasks, or the settings of one"),
    "place": ("place", "decide where the parts of a training step would run on a cluster"),
    "devices": ("devices", "list devices and links, and what they reach"),
}

HELP = """\
millrace: one training step as one dataflow graph, traced from ordinary PyTorch

usage: millrace COMMAND …          (millrace COMMAND --help tells more)

commands:
{commands}

To begin with:
  millrace train digits                    a reader of handwritten digits, in seconds, with a progress bar
  millrace predict latest photo.png        which digit is on a picture
  millrace eval latest                     how good the newest run is on data it never saw
  millrace graph digits --out step.svg     a picture of what one training step computes

To try things:
  millrace tasks chars                     every setting of a task, with its default
  millrace train digits --set epochs=5 --set seed=1
  millrace place chars --devices 2         what two workers would do with a training step, and how long it would take
  millrace resume latest                   go on where a run was interrupted, or killed, bit for bit
  tensorboard --logdir runs                curves and graphs of all runs

A run keeps everything (settings, metrics, checkpoints) in a directory of its own under runs/. Where a command takes a
RUN, give that directory, its name or the beginning of it, or "latest".

exit status: 0 done; 1 it failed; 2 wrong usage, setting or name; 130 interrupted (the run was saved)
environment: MILLRACE_TRACEBACK=1 shows where in the code an error came from; MILLRACE_CACHE=DIR keeps compiled steps\
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is as `--help` documents it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _short_warning
    command = arguments[0] if arguments else ""
    try:
        return _dispatch(command, arguments[1:])
    except KeyboardInterrupt as interrupt:
        return _say(interrupt, f"millrace: {str(interrupt) or 'interrupted'}", INTERRUPTED)
    except SettingError as error:
        return _say(error, f"millrace {command}: {error}", USAGE)
    except MillraceError as error:
        return _say(error, f"millrace {command}: {error}", FAILED)
    except BrokenPipeError:
        # Whoever read our output has had enough (`millrace graph digits | head`): end as other programs do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        return _say(error, f"millrace {command}: {_unexpected(error)}", FAILED)


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in ("", "-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        rows = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
        print(HELP.format(commands=rows), file=sys.stdout if command else sys.stderr)
        return OK if command else USAGE
    if command in ("-V", "--version"):
        print(f"millrace {__version__}")
        return OK
    if command not in COMMANDS:
        raise SettingError(f"there is no such command. {did_you_mean(command, list(COMMANDS))}")
    module = importlib.import_module(f"millrace.cli.{COMMANDS[command][0]}")
    status = module.main(arguments)
    sys.stdout.flush()  # here, where a closed pipe is handled
    return OK if status is None else int(status)


def _unexpected(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("millrace"):
        return f"{sys.executable} lacks {error.name}. Install millrace there: pip install 'millrace[zoo]'"
    return f"{error} (an unexpected {type(error).__name__}; {TRACEBACK}=1 shows where it came from)"


def _say(error: BaseException, message: str, status: int) -> int:
    """Print what happened, with whatever was noted on the way, and pass the status on."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    print("\n".join([message, *getattr(error, "__notes__", ())]), file=sys.stderr)
    return status


def _short_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"
