"""Connections that are waited for."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.runtime import messages
from millrace.runtime.messages import readable, until_readable


@pytest.fixture
def many_files() -> Iterator[None]:
    """As a process has that is connected with many: the next file's number is above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2000:
        pytest.skip(f"this system lets a process have {hard} open files")
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


def test_connections_of_a_process_with_many_files_are_waited_for(many_files: None) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for connection in (end for pair in pairs for end in pair):
            stack.enter_context(connection)
        ours = [here for here, _ in pairs]
        assert min(here.fileno() for here in ours) > 1023
        assert readable(ours, 0.0) == []
        pairs[1][1].send(b"x")
        pairs[2][1].close()
        assert readable(ours, 1.0) == ours[1:]
    with pytest.raises(ValueError, match="negative"):
        readable(ours, 1.0)


def test_who_has_nothing_to_say_for_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LONGEST_WAIT_S", 0.02)
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(until_readable, ours)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        theirs.sendall(b"!")
        waiting.result(5.0)
