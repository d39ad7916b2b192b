"""`millrace eval`: how good a run's model is on its test data."""

from __future__ import annotations

from millrace.cli.arguments import RUN_HELP, add_device, add_json, parser, print_json
from millrace.zoo.run import find_run, open_run, test_values

_DESCRIPTION = "Evaluate the newest checkpoint of a run on the task's test data, which its training never saw."
_EXAMPLES = """
millrace eval latest
millrace eval runs/digits-20260101-120000-abcd --json"""


def main(arguments: list[str]) -> None:
    """Parse, evaluate, print."""
    options = parser("eval", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_device(options)
    add_json(options)
    given = options.parse_args(arguments)
    opened = open_run(find_run(given.run), given.device)
    values = test_values(opened)
    for name, value in values.items():
        print(f"test {name.replace('_', ' ')} {value:.4f}")
    print(f"{opened.path}, step {opened.step}")
    if given.json:
        named = {f"test_{name}": value for name, value in values.items()}
        print_json({"task": opened.task.name(), **named, "step": opened.step, "run_dir": str(opened.path)})
