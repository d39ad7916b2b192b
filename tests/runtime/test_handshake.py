"""Only who knows the run's token and has its version gets through; nobody else disturbs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import SettingError, WorkerError
from millrace.runtime import handshake, proof
from millrace.runtime.handshake import Listener, dial, listen, new_token

TOKEN = new_token()
GREETING = proof._framed({"version": proof.__version__, "nonce": "any"})
WHERE = ["tcp:127.0.0.1:0", "unix:{}/private/socket"]


@contextlib.contextmanager
def listening(where: str, tmp_path: Path) -> Iterator[tuple[Listener, list[str]]]:
    refused: list[str] = []
    with contextlib.closing(listen(where.format(tmp_path), refused.append)) as listener:
        yield listener, refused


def raw(address: str) -> socket.socket:
    kind, _, place = address.partition(":")
    if kind == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(place)
        return connection
    host, _, port = place.rpartition(":")
    return socket.create_connection((host, int(port)))


@contextlib.contextmanager
def accepting(listener: Listener, timeout_s: float = 5.0) -> Iterator[Future[tuple[socket.socket, Mapping[str, Any]]]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(listener.accept, TOKEN, timeout_s)


def loaded_again(module: ModuleType) -> Any:
    spec = importlib.util.spec_from_file_location("another_" + module.__name__.rpartition(".")[2], module.__file__)
    assert spec is not None
    assert spec.loader is not None
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    return another


def another_version() -> Any:
    theirs, another = loaded_again(proof), loaded_again(handshake)
    theirs.__version__ = "99.0"
    another.ask, another.answer = theirs.ask, theirs.answer
    return another


@pytest.mark.parametrize("where", WHERE)
def test_both_sides_get_through_and_then_talk(where: str, tmp_path: Path) -> None:
    with listening(where, tmp_path) as (listener, refused), accepting(listener) as accepted:
        ours = dial(listener.address, TOKEN, {"name": "m7", "für": "✓"}, 5.0)
        theirs, hello = accepted.result()
        with ours, theirs:
            assert hello == {"name": "m7", "für": "✓"}
            theirs.setblocking(True)
            ours.sendall(b"what follows")
            assert theirs.recv(100) == b"what follows"
            theirs.sendall(b"an answer")
            assert ours.recv(100) == b"an answer"
            if where.startswith("tcp"):
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not refused
    assert not list((tmp_path / "private").glob("*")) if where.startswith("unix") else True


def test_the_token_never_travels(tmp_path: Path) -> None:
    """Everything that either side sends, seen by one who passes it on."""
    seen = bytearray()

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        while content := source.recv(4096):
            seen.extend(content)
            target.sendall(content)

    with (
        listening(WHERE[0], tmp_path) as (listener, _),
        accepting(listener) as accepted,
        socket.create_server(("127.0.0.1", 0)) as between,
        ThreadPoolExecutor(1) as pool,
    ):
        dialed = pool.submit(dial, f"tcp:127.0.0.1:{between.getsockname()[1]}", TOKEN, {}, 5.0)
        dialer, there = between.accept()[0], raw(listener.address)
        for pair in ((dialer, there), (there, dialer)):
            threading.Thread(target=pass_on, args=pair, daemon=True).start()
        with dialed.result(), accepted.result()[0]:
            pass
        dialer.close()
        there.close()
    assert len(seen) > 200
    assert TOKEN not in seen
    assert TOKEN.hex().encode() not in seen


@pytest.mark.parametrize("where", WHERE)
def test_another_token_is_refused_on_both_sides(where: str, tmp_path: Path) -> None:
    with listening(where, tmp_path) as (listener, refused), accepting(listener) as accepted:
        with pytest.raises(WorkerError, match="another token"):
            dial(listener.address, new_token(), {}, 5.0)
        with dial(listener.address, TOKEN, {"name": "right"}, 5.0):
            connection, hello = accepted.result()
            connection.close()
            assert hello == {"name": "right"}
    assert len(refused) == 1
    assert "another token" in refused[0]


def test_one_who_does_not_check_us_must_prove_itself_all_the_same(tmp_path: Path) -> None:
    """A dialer without the token that ignores our proof, or sends it back to us, or makes one up."""
    with listening(WHERE[0], tmp_path) as (listener, refused), accepting(listener) as accepted:
        for forged in (None, "0" * 64, 3, "é"):
            with raw(listener.address) as stranger:
                stranger.sendall(proof._framed({"version": proof.__version__, "nonce": "0" * 64}))
                head = stranger.recv(10, socket.MSG_WAITALL)
                answer = json.loads(stranger.recv(struct.unpack("<8sH", head)[1], socket.MSG_WAITALL))
                proven = answer["proof"] if forged is None else forged
                stranger.sendall(proof._framed({"proof": proven, "hello": "{}"}))
                assert b"refused" in stranger.recv(100)
        dial(listener.address, TOKEN, {}, 5.0).close()
        accepted.result()[0].close()
    assert len(refused) == 4


@pytest.mark.parametrize("theirs", ["listener", "dialer"])
def test_another_version_is_refused_on_both_sides_with_both_versions(theirs: str, tmp_path: Path) -> None:
    other = another_version()
    refused: list[str] = []
    open_, call = (other.listen, dial) if theirs == "listener" else (listen, other.dial)
    with contextlib.closing(open_(WHERE[0], refused.append)) as listener, accepting(listener, 0.5) as accepted:
        with pytest.raises(WorkerError, match="install the same version") as caught:
            call(listener.address, TOKEN, {}, 5.0)
        with pytest.raises(WorkerError, match="nobody who belongs to this run"):
            accepted.result()
    for text in (str(caught.value), *refused):
        assert "99.0" in text
        assert proof.__version__ in text
    assert len(refused) == 1


@pytest.mark.parametrize("where", WHERE)
def test_strangers_are_refused_and_the_next_one_gets_through(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "_HANDSHAKE_S", 0.3)
    head = struct.Struct("<8sH")
    foreign = {
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n": "does not speak millrace",
        head.pack(b"millrace", 65535): "65535 bytes",
        head.pack(b"millrace", 4096) + b"[" * 4096: "damaged",
        head.pack(b"millrace", 2) + b"[]": "damaged",
        head.pack(b"millrace", 0): "damaged",
        proof._framed({"version": proof.__version__}): "without its nonce",
        proof._framed({"version": ["x"] * 500}): "is millrace",
        GREETING + proof._framed({"proof": "\ud800", "hello": ""}): "another token",
        b"mill": "said nothing, or not enough",
        b"": "said nothing, or not enough",
    }
    with listening(where, tmp_path) as (listener, refused), contextlib.ExitStack() as stay:
        for content in foreign:
            stay.enter_context(raw(listener.address)).sendall(content)
        raw(listener.address).close()
        began_s = time.monotonic()
        with accepting(listener) as accepted, dial(listener.address, TOKEN, {"name": "ours"}, 5.0):
            accepted.result()[0].close()
            assert time.monotonic() - began_s < 0.3  # the silent ones did not hold it up
        with pytest.raises(WorkerError, match="nobody who belongs to this run"):
            listener.accept(TOKEN, 0.5)
        for text in [*foreign.values(), "ended in the middle"]:
            assert any(text in said for said in refused), (text, refused)
        assert len(refused) == len(foreign) + 1
        assert not listener._pending


def test_many_silent_strangers_do_not_keep_ours_out(tmp_path: Path) -> None:
    with listening(WHERE[0], tmp_path) as (listener, refused), contextlib.ExitStack() as stay:
        for _ in range(100):
            stay.enter_context(raw(listener.address))
        with accepting(listener) as accepted, dial(listener.address, TOKEN, {}, 5.0):
            accepted.result()[0].close()
        assert len(listener._pending) <= 64
        assert len(refused) >= 36


def test_who_has_to_go_for_another_in_the_moment_it_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_PENDING", 1)
    with listening(WHERE[0], tmp_path) as (listener, refused), contextlib.ExitStack() as stay:
        first = stay.enter_context(raw(listener.address))
        assert not listener.ready(TOKEN)
        stay.enter_context(raw(listener.address))
        first.sendall(b"something")
        time.sleep(0.05)  # both are there
        assert not listener.ready(TOKEN)
        assert len(refused) == 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PROOFS = st.fixed_dictionaries({}, optional={"proof": ANYTHING, "hello": ANYTHING, "refused": ANYTHING})


@given(st.binary(max_size=200) | PROOFS.map(lambda fields: GREETING + proof._framed(fields)))
def test_any_bytes_at_all_only_get_a_stranger_refused(content: bytes) -> None:
    def fed() -> None:
        steps = proof.answer(lambda _: None, TOKEN)
        needed, at = next(steps), 0
        while at + needed <= len(content):
            needed, at = steps.send(content[at : at + needed]), at + needed
        raise WorkerError("it says nothing more")

    with pytest.raises(WorkerError):
        fed()


def test_who_dials_says_what_is_wrong_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        began_s = time.monotonic()
        with pytest.raises(WorkerError, match=r"said too little within 0\.2 s"):
            dial(address, TOKEN, {}, 0.2)
        assert time.monotonic() - began_s < 1.0
        server.accept()[0].close()
        with ThreadPoolExecutor(1) as pool:
            dialed = pool.submit(dial, address, TOKEN, {}, 5.0)
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
                with pytest.raises(WorkerError, match="does not speak millrace"):
                    dialed.result()
    with pytest.raises(WorkerError, match="nobody answers at"):
        dial(address, TOKEN, {}, 1.0)
    with pytest.raises(WorkerError, match="nobody answers at"):
        dial(f"unix:{tmp_path}/nothing/here", TOKEN, {}, 1.0)


def test_an_impostor_who_listens_learns_nothing_that_helps(tmp_path: Path) -> None:
    """Somebody without the token in the place of our listener: the dialer does not say its hello."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        dialed = pool.submit(dial, f"tcp:127.0.0.1:{server.getsockname()[1]}", TOKEN, {"name": "secret name"}, 5.0)
        connection, _ = server.accept()
        with connection:
            asked = connection.recv(4096)
            nonce = json.loads(asked[10:])["nonce"]
            connection.sendall(proof._framed({"version": proof.__version__, "nonce": nonce, "proof": "0" * 64}))
            with pytest.raises(WorkerError, match="another token"):
                dialed.result()
            assert b"secret" not in asked + connection.recv(4096)


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for where in ("", "tcp", "tcp:1", "tcp:host:many", "udp:127.0.0.1:1", "unix:"):
        with pytest.raises(SettingError, match="is no address"):
            listen(where)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(SettingError, match="0700"):
        listen(f"unix:{tmp_path}/open/socket")
    with listening(WHERE[1], tmp_path) as (listener, _), pytest.raises(WorkerError, match="in use"):
        listen(listener.address)
    for token, hello, said in ((b"", {}, "at least 16 bytes"), (TOKEN, {"long": "x" * 5000}, "does not fit")):
        with (
            listening(WHERE[0], tmp_path) as (listener, _),
            accepting(listener, 0.2),
            pytest.raises(SettingError, match=said),
        ):
            dial(listener.address, token, hello, 1.0)


def test_long_paths_hold_sockets_too(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    with listening(f"unix:{deep}/socket", tmp_path) as (listener, _), accepting(listener) as accepted:
        dial(listener.address, TOKEN, {}, 5.0).close()
        accepted.result()[0].close()
    assert os.listdir(deep) == []
