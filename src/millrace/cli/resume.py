"""`millrace resume`: go on with a run, as it was."""

from __future__ import annotations

from millrace.cli import train
from millrace.cli.arguments import RUN_HELP, add_json, add_settings, parser
from millrace.zoo.run import find_run

_DESCRIPTION = """\
Go on with a run that was stopped or killed, or is to get longer, over the same devices or replicas as before. To go on
over others, name them: millrace train --resume RUN --replicas 4"""
_EXAMPLES = """
millrace resume latest
millrace resume digits-20260101-120000-abcd --set epochs=60     for longer"""


def main(arguments: list[str]) -> None:
    """Parse, and train with the arguments that the run was started with."""
    options = parser("resume", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_settings(options)
    add_json(options)
    options.add_argument("--quiet", action="store_true", help="show no progress")
    given = options.parse_args(arguments)
    run = find_run(given.run)
    again = ["--resume", str(run.path), *run.config.get("arguments", [])]
    again += [word for text in given.assignments for word in ("--set", text)]
    train.main([*again, *(["--json"] if given.json else []), *(["--quiet"] if given.quiet else [])])
