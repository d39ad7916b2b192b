"""Looking at a model through the averages of its parameters that an optimizer keeps (`millrace.optim.Optimizer`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millrace.optim.average import averages_in
from millrace.runtime.remote_session import AnySession


@contextmanager
def averaged(session: AnySession) -> Iterator[None]:
    """Within, the traced module's parameters hold their averages, where there are any; then their own values again."""
    own = session.variables
    before = {name: own[name].clone() for name in averages_in(own)}
    put_averages(session)
    try:
        yield
    finally:
        for name, value in before.items():
            own[name].copy_(value)


def put_averages(session: AnySession) -> None:
    """Leave the averages in the traced module's parameters, when training is over and saved."""
    own = session.variables
    for name, value in averages_in(own).items():
        own[name].copy_(value)
