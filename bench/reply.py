"""python -m bench.reply RUN: the page of short replies: what a finished run reaches, and what it offers.

Writes the figures in docs/zoo/reply.md and the picture beside it from the run's directory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import cast

import torch

from bench.readme import between
from millrace.zoo.reply import Reply
from millrace.zoo.run import find_run, open_run, test_values

PAGE = Path(__file__).parents[1] / "docs" / "zoo" / "reply.md"
SHOWN = 8
_WIDTH, _ROW, _LETTER = 900, 62, 6.6  # pixels; the last is a letter's width, about


def main(run: str) -> None:
    """Evaluate, draw, and write."""
    torch.set_num_threads(1)
    opened = open_run(find_run(run), "cpu")
    task = cast(Reply, opened.task)
    values = test_values(opened)
    shares = ", ".join(f"{name} {values[name]:.3f}" for name in ("precision", "recall", "top3", "top1"))
    report, _, _ = task.report(opened.model, task.data(opened.facts)).partition("\n\n  ")
    text = f"```\n{opened.step} steps; of all test messages: {shares}\n{report}\n```"
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    shown = [(message, task.said(opened.model, message)) for message in task.examples(SHOWN)]
    PAGE.with_suffix(".svg").write_text(picture(shown), encoding="utf-8")


def picture(shown: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Every message, and under it the replies as buttons; a message without them stands in grey."""
    height = _ROW * len(shown) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="Helvetica, Arial, '
        f'sans-serif" font-size="13"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
    ]
    for number, (message, replies) in enumerate(shown):
        top = 24 + number * _ROW
        parts.append(f'<text x="16" y="{top}" fill="{"#222" if replies else "#999"}">{escape(message)}</text>')
        left = 16.0
        for reply in replies:
            width = 24 + _LETTER * len(reply)
            box = f'x="{left:.0f}" y="{top + 9}" width="{width:.0f}" height="24" rx="12" fill="#fff" stroke="#1f5fa8"'
            at = f'x="{left + width / 2:.0f}" y="{top + 26}" fill="#1f5fa8" text-anchor="middle"'
            parts.append(f"<rect {box}/><text {at}>{escape(reply)}</text>")
            left += width + 10
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main(sys.argv[1])
