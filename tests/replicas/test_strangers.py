"""Strangers at every port that a running run has, by the kernel's own list, are refused, and it goes on unharmed."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from tests.ray_head import processes
from tests.small import cross_entropy, labelled, mlp

import millrace
from millrace.errors import WorkerError
from millrace.runtime.handshake import dial, new_token
from millrace.runtime.proof import _framed
from millrace.train.callbacks import Callback, RunView
from millrace.version import __version__

STEPS, AT = 30, 5
FOREIGN = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x80\x04\x95pickled",
    struct.pack("<8sH", b"millrace", 65535),  # a huge length
    b"\xff" * 5000,
    _framed({"version": __version__, "nonce": "x"}) + _framed({"proof": "\ud800", "hello": ""}),  # no Unicode
    b"mill",  # and then nothing more
    b"",
)


def tcp_ports() -> list[tuple[str, int]]:
    """The TCP addresses at which this process and those below it listen."""
    inodes = set()
    for pid in [os.getpid(), *processes()]:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, _, port = fields[1].partition(":")
                words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


class Strangers(Callback):
    """After some steps, they come to all sockets, and stay until the end."""

    def __init__(self, directory: Path, before: list[tuple[str, int]]) -> None:
        self.sockets: list[Path] = []
        self.ports: list[tuple[str, int]] = []
        self.answers: list[str] = []
        self.stay = contextlib.ExitStack()
        self._directory, self._before = directory, before

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step != AT:
            return
        self.sockets = [path for path in self._directory.rglob("*") if path.is_socket()]
        self.ports = [place for place in tcp_ports() if place not in self._before]
        for content in FOREIGN:
            for path in self.sockets:
                self._say(socket.AF_UNIX, str(path), content)
            for place in self.ports:
                self._say(socket.AF_INET, place, content)
        for path in self.sockets:
            with pytest.raises(WorkerError) as refused:
                dial(f"unix:{path}", new_token(), {"name": "m0", "for": "line"}, 10.0)
            self.answers.append(str(refused.value))

    def _say(self, family: socket.AddressFamily, place: Any, content: bytes) -> None:
        stranger = self.stay.enter_context(socket.socket(family))
        stranger.connect(place)
        with contextlib.suppress(OSError):
            stranger.sendall(content)


def trained(directory: Path, callbacks: list[Callback], **settings: Any) -> tuple[Mapping[str, torch.Tensor], Any]:
    model = mlp()
    result = millrace.fit(
        model,
        labelled(64),
        loss=cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=8,
        steps=STEPS,
        compile="eager",
        progress=False,
        run_dir=directory,
        callbacks=callbacks,
        replicas=2,
        spares=0,
        **settings,
    )
    return model.state_dict(), result


@pytest.mark.parametrize(
    ("settings", "listening", "ports"),
    [({}, 1, 1), ({"transport": "gloo"}, 1, 3), ({"update": "async"}, 3, 0)],  # a meeting place, and two of gloo
    ids=["shared memory", "gloo", "servers"],
)
def test_strangers_everywhere_change_nothing(
    settings: dict[str, Any], listening: int, ports: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    strangers = Strangers(tmp_path, tcp_ports())
    with strangers.stay:
        weights, result = trained(tmp_path / "run", [strangers], **settings)
    assert result.steps == STEPS
    assert len(strangers.sockets) == listening, "the driver; a server and its copy"
    assert all("another token" in answer or "did not take" in answer for answer in strangers.answers), strangers.answers
    assert len(strangers.ports) == ports
    assert {host for host, _ in strangers.ports} <= {"127.0.0.1"}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "does not speak millrace's language" in log
    assert "another token" in log
    assert "was lost" not in log[log.index("was refused") :], "before them a busy machine may have cost a worker"
    if "update" not in settings:
        undisturbed, _ = trained(tmp_path / "other", [], **settings)
        assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)
