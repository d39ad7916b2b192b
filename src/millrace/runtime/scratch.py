"""A directory for a run's sockets and logs, which is gone when the run is, however that ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile

# Waits for the end of its standard input, which is that of the driver. What is being killed may write for a moment.
_WATCH = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(50):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    time.sleep(0.1)
    if not os.path.exists(sys.argv[1]):
        break
"""


class ScratchDirectory(tempfile.TemporaryDirectory[str]):
    """A directory with a short path, as those of sockets must be, that only this user may enter.

    A small process beside this one removes it when this one is killed, and can clean up nothing itself.
    """

    def __init__(self) -> None:
        super().__init__(prefix="millrace-")
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends this process by its group is not to end that one
        )

    def cleanup(self) -> None:
        """Remove it now."""
        super().cleanup()
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()
