"""What the commands' arguments and output have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

RUN_HELP = 'a run\'s directory, its name under runs/ or the beginning of it, or "latest"'


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for `millrace COMMAND`, whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"millrace {command}",
        description=description,
        epilog="examples:\n" + "\n".join("  " + line for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--set, as often as one likes."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="a setting of the task, such as seed=1 or compile=eager; `millrace tasks TASK` lists them",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: CUDA where there is one)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")


def print_json(values: Mapping[str, Any]) -> None:
    """One line."""
    print(json.dumps(values, ensure_ascii=False))


def tell(text: str) -> None:
    """A line for whoever waits, on standard error."""
    print(text, file=sys.stderr, flush=True)
