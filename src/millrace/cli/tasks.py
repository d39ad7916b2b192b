"""`millrace tasks`: which tasks there are, and what can be set."""

from __future__ import annotations

from millrace.cli.arguments import parser
from millrace.zoo.registry import load, summaries
from millrace.zoo.settings import describe

_DESCRIPTION = "List the tasks; or, given the name of one, all its settings with their defaults."
_EXAMPLES = """
millrace tasks
millrace tasks digits"""


def main(arguments: list[str]) -> None:
    """Parse, list."""
    options = parser("tasks", _DESCRIPTION, _EXAMPLES)
    options.add_argument("task", nargs="?", metavar="TASK", help="list the settings of this one")
    given = options.parse_args(arguments)
    if given.task is None:
        found = summaries()
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {summary}" for name, summary in found.items()))
        return
    settings = list(describe(load(given.task).settings_type))
    width = max(len(f"{each.name}={each.default}") for each in settings)
    for each in settings:
        default = f"{each.name}={str(each.default).lower() if each.default is None else each.default}"
        print(f"  {default:{width}}  {each.help} ({each.expected()})")
    print(f"\nmillrace train {given.task} --set {settings[0].name}=… sets one")
