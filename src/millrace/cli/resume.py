"""`millrace resume`: go on with a run, as it was."""

from __future__ import annotations

from millrace.cli import train
from millrace.cli.arguments import RUN_HELP, add_json, add_settings, parser
from millrace.cli.remote import add_cluster, add_python
from millrace.runtime.jobs import open_jobs
from millrace.zoo.run import find_run
from millrace.zoo.submitted import find_submitted, resume

_DESCRIPTION = """\
Go on with a run that was stopped or killed, or is to get longer, over the same devices or replicas as before. To go on
over others, name them: millrace train --resume RUN --replicas 4"""
_EXAMPLES = """
millrace resume latest
millrace resume digits-20260101-120000-abcd --set epochs=60     for longer
millrace resume latest --cluster http://10.0.0.5:8265           a submitted run, there"""


def main(arguments: list[str]) -> None:
    """Parse, and train with the arguments that the run was started with."""
    options = parser("resume", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_settings(options)
    add_json(options)
    options.add_argument("--quiet", action="store_true", help="show no progress")
    add_cluster(options)
    add_python(options)
    given = options.parse_args(arguments)
    settings = [word for text in given.assignments for word in ("--set", text)]
    if given.cluster is not None:
        jobs = open_jobs(given.cluster)
        resumed = resume(jobs, find_submitted(jobs, given.run), settings, given.python)
        print(f"{resumed.name} goes on. To see what it says: millrace logs {resumed.name} --cluster {jobs.address}")
        return
    run = find_run(given.run)
    again = ["--resume", str(run.path), *run.config.get("arguments", []), *settings]
    train.main([*again, *(["--json"] if given.json else []), *(["--quiet"] if given.quiet else [])])
