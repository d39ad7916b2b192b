"""`millrace predict`: use a trained model on files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from millrace.cli.arguments import RUN_HELP, add_device, add_json, parser, print_json
from millrace.data.images import write_png
from millrace.errors import DataError
from millrace.zoo.run import find_run, open_run

_DESCRIPTION = """\
Use the model of a run on files: for digits pictures of one digit each, for chars texts to go on with.
Where there is something to look at, pictures are written, too.

A file that cannot be used is named on standard error, the others are done all the same, and the exit status is 1."""
_EXAMPLES = """
millrace predict latest photo.png
millrace predict runs/digits-20260101-120000-abcd scans/*.png --json"""


def main(arguments: list[str]) -> int:
    """Parse, predict, print."""
    options = parser("predict", _DESCRIPTION, _EXAMPLES)
    options.add_argument("run", metavar="RUN", help=RUN_HELP)
    options.add_argument("files", metavar="FILE", nargs="+", type=Path, help="what the task's model takes")
    options.add_argument(
        "--pictures", metavar="DIR", type=Path, help="where pictures go (default: predictions/ in the run directory)"
    )
    add_device(options)
    add_json(options)
    given = options.parse_args(arguments)
    opened = open_run(find_run(given.run), given.device)
    directory = given.pictures or opened.path / "predictions"
    predictions: list[dict[str, Any]] = []
    failed = 0
    for file in given.files:
        try:
            prediction = opened.task.predict(opened.model, file, opened.facts)
        except DataError as error:
            failed += 1
            print(f"millrace predict: {error}", file=sys.stderr)
            continue
        print(f"{file}: {prediction.text}")
        seen = {name: str(directory / f"{file.stem}-{name}.png") for name in prediction.pictures}
        for name, picture in prediction.pictures.items():
            write_png(picture, Path(seen[name]))
            print(f"  {name}: {seen[name]}")
        predictions.append({"file": str(file), **prediction.values, **({"pictures": seen} if seen else {})})
    if given.json:
        print_json({"run_dir": str(opened.path), "step": opened.step, "predictions": predictions})
    return 1 if failed else 0
