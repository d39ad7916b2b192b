"""A role for tests: says back what it is told, and misbehaves when asked to. Imported by members (`--imports`)."""

from __future__ import annotations

import time

from millrace.replicas.line import Line
from millrace.replicas.roles import ROLES
from millrace.runtime.messages import Message


def echo(line: Line, given: Message) -> None:
    """kind "echo": said back. "work": counts and sleeps. "hang": sleeps. "fail": raises. "leave": returns."""
    line.say(Message("begun", dict(given.fields)))
    while True:
        message = line.next(60.0)
        if message is None or message.kind == "leave":
            return
        if message.kind == "fail":
            raise ValueError(message.fields["text"])
        if message.kind == "work":
            for turn in range(message.fields["turns"]):
                line.progress(f"turn {turn}")
                time.sleep(0.05)
                if line.abandoned(message.fields.get("generation", 2**31)):
                    break
        if message.kind == "hang":
            line.progress("a nap")
            time.sleep(600.0)
        line.say(Message("said", {"kind": message.kind, **message.fields}, dict(message.tensors)))


ROLES["echo"] = echo
