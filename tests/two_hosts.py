"""Hosts with a network between them, on this machine: Linux namespaces, joined by a switch whose cables can be pulled.

A host has network interfaces, a host name, processes, /dev/shm and a directory for temporary files of its own. Whatever
runs on it ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

_COMMANDS = ("ip", "unshare", "nsenter", "mount", "hostname")
_WITHIN_S = 10.0
_INIT = """
hostname "$1" && ip link set lo up && mount -t tmpfs tmpfs /dev/shm && mount --bind "$2" "$3" || exit 1
mount --bind "$4" /etc/hosts && mount --bind "$5" /etc/resolv.conf || exit 1
echo up; sleep infinity & wait
"""


class Host:
    """One, from `with` on.

    temporary: a path that every host has for itself, which is `files` seen from outside. names: its /etc/hosts and
    /etc/resolv.conf.
    """

    def __init__(self, name: str, address: str, files: Path, temporary: Path, names: tuple[Path, Path]) -> None:
        self.name, self.address, self.files, self.temporary, self._names = name, address, files, temporary, names
        self._pid = 0  # the first process on it

    def __enter__(self) -> Host:
        self.files.mkdir(parents=True, exist_ok=True)
        self.temporary.mkdir(parents=True, exist_ok=True)
        apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._process = subprocess.Popen(
            [*apart, "sh", "-c", _INIT, "sh", self.name, *map(str, (self.files, self.temporary, *self._names))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "up\n":
            _, why = self._process.communicate(timeout=_WITHIN_S)
            raise OSError(why.strip())
        unshare = self._process.pid
        self._pid = int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=_WITHIN_S)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: int | IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a process on it. out: where its standard output and error go."""
        inside = ["nsenter", f"--target={self._pid}", "--net", "--uts", "--mount", "--pid"]
        return subprocess.Popen([*inside, *command], env=environment, stdout=out, stderr=out, stdin=subprocess.PIPE)

    def ip(self, *arguments: str) -> None:
        """Run `ip` in its network."""
        subprocess.run(
            ["nsenter", f"--target={self._pid}", "--net", "ip", *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=_WITHIN_S,
        )

    def seen(self, path: Path) -> Path:
        """A path of its own, as this process reaches it."""
        return Path(f"/proc/{self._pid}/root{path}")

    def processes(self) -> dict[int, str]:
        """What runs on it, zombies and its first processes apart: numbers as seen from outside, and names."""
        own = os.readlink(f"/proc/{self._pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and os.readlink(entry / "ns/pid") == own and pid != self._pid:
                    found[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        return {pid: command for pid, command in found.items() if command != "sleep infinity"}


class Switch:
    """Joins hosts. Whoever is cut off keeps address and routes, as with a cable that is pulled elsewhere."""

    def __init__(self, switch: Host) -> None:
        self._switch = switch
        switch.ip("link", "add", "switch", "type", "bridge")
        switch.ip("link", "set", "switch", "up")

    def join(self, host: Host) -> None:
        port = f"to-{host.name}"
        self._switch.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host._pid))
        self._switch.ip("link", "set", port, "master", "switch", "up")
        host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("route", "add", "default", "dev", "eth0")

    def cut(self, host: Host) -> float:
        """Take its link down. Returns: when."""
        at_s = time.monotonic()
        self._switch.ip("link", "set", f"to-{host.name}", "down")
        return at_s

    def mend(self, host: Host) -> float:
        """Bring it up again. Returns: when."""
        self._switch.ip("link", "set", f"to-{host.name}", "up")
        return time.monotonic()


@contextlib.contextmanager
def hosts(directory: Path, *names: str, name_server: bool = True) -> Iterator[tuple[Switch, list[Host]]]:
    """Hosts on one switch. Skips the test, and says why, where this machine does not allow it.

    name_server: False: they know no names, and whom they are to ask for them is out of reach.
    """
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"hosts of their own need root, and the commands {', '.join(_COMMANDS)} (missing: {missing})")
    with contextlib.ExitStack() as stack:
        try:
            addresses = {name: f"10.77.0.{number}" for number, name in enumerate(("switch", *names), start=1)}
            known = {"localhost": "127.0.0.1", **(addresses if name_server else {})}
            files = directory / "hosts", directory / "resolv.conf"
            files[0].write_text("".join(f"{at} {name}\n" for name, at in known.items()))
            files[1].write_text("" if name_server else "nameserver 10.77.0.250\n")
            made = [
                stack.enter_context(Host(name, at, directory / name, directory / "tmp", files))
                for name, at in addresses.items()
            ]
            switch = Switch(made[0])
            for host in made[1:]:
                switch.join(host)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no hosts of their own: {getattr(error, 'stderr', None) or error}")
        yield switch, made[1:]
