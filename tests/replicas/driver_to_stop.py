"""A driver for tests, which stop and kill it. Says in lines of JSON what happens.

As a process: `python driver_to_stop.py DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from millrace.replicas.hub import Hub, Joined
from millrace.runtime.handshake import new_token
from millrace.runtime.launch import ProcessLauncher
from millrace.runtime.messages import Message


def main(directory: Path) -> None:
    launcher = ProcessLauncher("millrace.replicas.member", ["--imports", "echo_role"], 1, directory)
    hub = Hub(launcher, new_token(), directory, print)
    hub.start(2)
    while True:
        event = hub.next(60.0)
        assert event is not None
        if isinstance(event, Joined):
            hub.send(event.member, Message("role", {"role": "echo", "pid": event.pid}))
            hub.send(event.member, Message("work", {"turns": 10000}))
            hub.expect(event.member, 0.9)
            print(json.dumps({"pid": event.pid}), flush=True)
        else:
            print(json.dumps({"event": str(event)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
