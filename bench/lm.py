"""python -m bench.lm RUN: the page of the language model: what a finished run is compared with, and how it learned.

Writes the table in docs/zoo/lm.md and the picture beside it from the run's directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import torch

from bench.charts import line_chart
from bench.readme import between
from millrace.data.streams import StreamBatches
from millrace.models.byte_lstm import ByteLstm
from millrace.zoo.lm import Lm
from millrace.zoo.run import find_run, open_run

PAGE = Path(__file__).parents[1] / "docs" / "zoo" / "lm.md"
DRAWN = ("5-gram", "xz -9, which", "gzip -9, which")  # of what it is compared with


def main(run: str) -> None:
    """Compare, draw, and write."""
    torch.set_num_threads(1)
    opened = open_run(find_run(run), "cpu")
    task = cast(Lm, opened.task)
    data = task.data(opened.facts)
    parts = [cast(StreamBatches, part) for part in (data.train, data.validation, data.test)]
    found = task.compared(cast(ByteLstm, opened.model), *parts)
    rows = [f"| {name} | {bits:.3f} |" for name, bits in sorted(found.items(), key=lambda pair: pair[1])]
    sizes = ", ".join(
        f"{len(part.tokens):,} bytes {use}"
        for part, use in zip(parts, ("to train on", "for validation", "of test"), strict=True)
    )
    table = "\n".join(
        ["| bits per byte of the test text | |", "| --- | ---: |", *rows, "", f"{opened.step} steps; {sizes}."]
    )
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    PAGE.with_suffix(".svg").write_text(picture(opened.path / "metrics.jsonl", found, task), encoding="utf-8")


def picture(metrics: Path, found: dict[str, float], task: Lm) -> str:
    """How validation went on with the text that was read, and where others stand on the test text."""
    window_bytes = task.settings.batch_size * task.settings.length
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [
        (entry["step"] * window_bytes / 1e6, entry["validation/bits_per_byte"])
        for entry in logged
        if "validation/bits_per_byte" in entry
    ]
    lines = {"LSTM, validation text": points}
    ends = (points[0][0], points[-1][0])
    for name, bits in found.items():
        if name.startswith(DRAWN):
            lines[name.partition(",")[0] + ", test text"] = [(end, bits) for end in ends]
    return line_chart("Bits per byte while it learns", "million bytes read", "bits per byte", lines, log=False)


if __name__ == "__main__":
    main(sys.argv[1])
