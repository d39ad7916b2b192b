"""`millrace place`: where the parts of a task's training step would run on a cluster, and what that would cost."""

from __future__ import annotations

from pathlib import Path

from millrace.cli.arguments import add_json, add_settings, parser, print_json
from millrace.cli.placing import add_placing, placed_step
from millrace.errors import MillraceError
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.place.summary import as_json, describe

_DESCRIPTION = """\
Decide which device of a cluster runs which part of a task's training step, and say what to expect of it: the time of a
step, how busy each device is, how much memory it needs, and what goes over each link.

The cluster may be one that you don't have: describe it in a file (see `millrace devices --write FILE`)."""
_EXAMPLES = """
millrace place chars --cluster four-gpus.toml
millrace place chars --cluster four-gpus.toml --microbatches 8 --out step.json     the timeline, for ui.perfetto.dev
millrace place chars --devices 2 --on "blocks.0=cpu:0"                             two workers on this machine
millrace place chars --cluster four-gpus.toml --search heft"""


def main(arguments: list[str]) -> None:
    """Parse, place, print."""
    options = parser("place", _DESCRIPTION, _EXAMPLES)
    options.add_argument("task", metavar="TASK", help="one of `millrace tasks`")
    add_settings(options)
    add_placing(options)
    options.add_argument("--out", type=Path, metavar="FILE.json", help="write the expected timeline")
    add_json(options)
    given = options.parse_args(arguments)
    _, found = placed_step(given)
    print(describe(found))
    if given.out is not None:
        try:
            write_trace(expected_spans(found), given.out, f"{given.task}, as expected")
        except OSError as error:
            why = error.strerror or error
            raise MillraceError(f"Cannot write {given.out}: {why}. Choose another place.") from error
        print(f"\n{given.out}: the timeline, to be opened at ui.perfetto.dev")
    if given.json:
        print_json(as_json(found))
