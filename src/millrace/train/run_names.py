"""Which run a person means."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.errors import RunDirectoryError, did_you_mean

_SHOWN = 4


def chosen_name(name: str, known: Sequence[str], where: str) -> str:
    """The one of the `known` names of runs that is, or begins with, `name`. where: they were looked for, in words.

    Raises: RunDirectoryError when there is none, or several begin so; the message shows the near names.
    """
    found = [each for each in known if each == name] or [each for each in known if name and each.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunDirectoryError(f"No run is at {where}. {did_you_mean(name, list(known))}")
    shown = ", ".join(sorted(found)[-_SHOWN:])
    raise RunDirectoryError(
        f"{len(found)} runs begin with {name!r} (such as {shown}): give more of the name, or say latest."
    )
