"""A process that has imported all there is to import, said hello, and does what the driver gives it to do.

As a process: `python -m millrace.replicas.member NAME PARENT_PID [--divided] [--gpus] [--imports MODULE …]
[--memory-bytes N]`, with the driver's address, the run's token and its directory in the environment, which other users
cannot read. With --divided, workers have device processes of their own, for whose start it gets ready while it stands
by. With --gpus it says which GPUs it may use.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from millrace.child_process import end_with, show_as
from millrace.errors import SettingError, did_you_mean
from millrace.fork_server import prepare
from millrace.replicas import gpus
from millrace.replicas.line import Line
from millrace.replicas.roles import ROLES
from millrace.runtime.device_worker import error_message, hold_to
from millrace.runtime.handshake import dial
from millrace.runtime.messages import LONGEST_WAIT_S, Message
from millrace.runtime.workers import DEVICE_WORKER

for _module in ("millrace.runtime.session", "millrace.compile.tiered"):  # roles need them, and are to begin at once
    importlib.import_module(_module)
_DIAL_S = 30.0
_STANDS_BY_S = 3.0  # whoever has had no role for so long is a spare
_USER_TIMEOUT_MS = 5000  # a cut cable is noticed when beats are not acknowledged for so long


def environment(address: str, token: bytes, directory: Path) -> dict[str, str]:
    """What a member finds in its environment."""
    return {"MILLRACE_ADDRESS": address, "MILLRACE_TOKEN": token.hex(), "MILLRACE_DIRECTORY": str(directory)}


def main(arguments: list[str]) -> int:
    """Take roles until the driver ends, or one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m millrace.replicas.member")
    parser.add_argument("name")
    parser.add_argument("parent", type=int)
    parser.add_argument("--divided", action="store_true")
    parser.add_argument("--gpus", action="store_true")
    parser.add_argument("--imports", nargs="*", default=[])
    parser.add_argument("--memory-bytes", type=int)
    asked = parser.parse_args(arguments)
    end_with(asked.parent)
    show_as(f"millrace {asked.name}")
    for module in asked.imports:
        importlib.import_module(module)
    torch.ones(64, 64).matmul(torch.ones(64, 64))  # the first product starts threads
    if asked.memory_bytes is not None:
        hold_to(asked.memory_bytes)
    line = _call_driver(asked.name, os.environ, asked.gpus)
    os.environ["TMPDIR"] = tempfile.tempdir = str(line.directory)  # what a killed process leaves goes with the run
    prepared = not asked.divided
    while True:
        message = line.next(LONGEST_WAIT_S if prepared else _STANDS_BY_S)
        if message is None and not prepared:
            prepare(DEVICE_WORKER)
            prepared = True
        if message is None or message.kind != "role":
            continue  # for the role before, which has returned
        try:
            _take(line, message)
        except Exception as error:
            traceback.print_exc()
            line.say(error_message(error))
            return 1


def _take(line: Line, message: Message) -> None:
    name = message.fields["role"]
    if name not in ROLES:
        raise SettingError(f"{line.name} was given the role {name!r}. {did_you_mean(name, list(ROLES))}")
    ROLES[name](line, message)


def _host() -> str:
    """Names this machine, also beside another of the same name."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} ({Path('/proc/sys/kernel/random/boot_id').read_text()[:8]})"
    return socket.gethostname()


def _call_driver(name: str, variables: Mapping[str, str], on_gpus: bool) -> Line:
    address, token = variables["MILLRACE_ADDRESS"], bytes.fromhex(variables["MILLRACE_TOKEN"])
    hello: dict[str, Any] = {"name": name, "pid": os.getpid(), "host": _host()}
    if on_gpus:
        hello |= {"gpus": gpus.visible_gpus(), "nccl": distributed.is_nccl_available()}
    connection = dial(address, token, {**hello, "for": "line"}, _DIAL_S)
    beat = dial(address, token, {**hello, "for": "beat"}, _DIAL_S)
    if beat.family != socket.AF_UNIX and sys.platform == "linux":
        beat.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    directory = Path(variables["MILLRACE_DIRECTORY"])
    if not directory.is_dir():  # we are on another machine
        directory = Path(variables["MILLRACE_SCRATCH"])
    return Line(name, directory, token, connection, beat)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # other threads may be in the middle of anything
