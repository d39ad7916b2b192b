"""What a member imports (`--imports`) to look as if it were on a machine of its own."""

from __future__ import annotations

import os
import socket

_NAME = os.path.basename(os.environ.get("MILLRACE_SCRATCH", ""))
if _NAME:  # not where this is only looked at
    socket.gethostname = lambda: _NAME
