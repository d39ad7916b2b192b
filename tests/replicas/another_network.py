"""What a member imports (`--imports`) to be on a machine of its own: it enters the namespace that it is told."""

from __future__ import annotations

import ctypes
import os
import socket

NAMESPACE = "MILLRACE_TEST_NAMESPACE"
_CLONE_NEWNET = 0x40000000

if _name := os.environ.get(NAMESPACE):  # of this thread, and those that it starts
    with open(f"/run/netns/{_name}") as _namespace:
        if ctypes.CDLL(None, use_errno=True).setns(_namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {_name}")
    socket.gethostname = lambda: _name
