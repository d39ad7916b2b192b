"""What the two ends of a connection say to prove to each other that they belong to one run, without the connection.

Both know the run's token, a secret that never travels. Each sends a number of its own (a nonce) and proves that it
knows the token by an HMAC over both numbers, the listener first. Four frames, each of a fixed head (what we are, the
length) and at most 4 KiB of JSON each, so that a stranger cannot make us allocate or wait:

    dialer    version, nonce
    listener  version, nonce, proof
    dialer    proof (over what follows, too), hello: whatever it wants to say of itself
    listener  welcome

Nothing is encrypted: who can read the network can read what is sent later. Keep runs to networks that you trust.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import struct
from collections.abc import Callable, Generator, Mapping
from typing import Any

from millrace.errors import SettingError, WorkerError
from millrace.version import __version__

_HEAD = struct.Struct("<8sH")
_MAGIC = b"millrace"
_LONGEST_BYTES = 4096
_NONCE_BYTES = 32
_SHORTEST_TOKEN_BYTES = 16

Fields = dict[str, Any]
Steps = Generator[int, bytes, Fields]  # yields how many bytes it reads next; returns the other's hello


def answer(write: Callable[[bytes], object], token: bytes) -> Steps:
    """The listener's side: writes what it says, and yields how many bytes it reads.

    Raises: WorkerError that says of the other what is wrong with it.
    """
    asked = yield from _frame()
    if asked.get("version") != __version__:
        _try(write, {"version": __version__})
        raise WorkerError(_other_version(asked))
    theirs, ours = _text(asked, "nonce"), secrets.token_hex(_NONCE_BYTES)
    write(_framed({"version": __version__, "nonce": ours, "proof": _proof(token, "listener", theirs, ours, "")}))
    proven = yield from _frame()
    hello = _text(proven, "hello") if "proof" in proven else ""
    if not _equal(str(proven.get("proof")), _proof(token, "dialer", theirs, ours, hello)):
        _try(write, {"refused": "token"})
        raise WorkerError("has another token: it belongs to another run")
    write(_framed({"welcome": True}))
    return _object(hello.encode())


def ask(write: Callable[[bytes], object], token: bytes, fields: Mapping[str, Any]) -> Steps:
    """The dialer's side. fields: what it says of itself. Raises: as `answer`."""
    ours, hello = secrets.token_hex(_NONCE_BYTES), json.dumps(dict(fields))
    write(_framed({"version": __version__, "nonce": ours}))
    answer = yield from _frame()
    if answer.get("version") != __version__:
        raise WorkerError(_other_version(answer))
    theirs = _text(answer, "nonce")
    if not _equal(_text(answer, "proof"), _proof(token, "listener", ours, theirs, "")):
        _try(write, {"refused": "token"})
        raise WorkerError("has another token: it belongs to another run")
    write(_framed({"proof": _proof(token, "dialer", ours, theirs, hello), "hello": hello}))
    end = yield from _frame()
    if not end.get("welcome"):
        raise WorkerError("did not take this process for one of its run")
    return {}


def _try(write: Callable[[bytes], object], fields: Fields) -> None:
    with contextlib.suppress(OSError):  # it need not wait for what we say
        write(_framed(fields))


def _frame() -> Steps:
    head = yield _HEAD.size
    magic, length = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise WorkerError(f"does not speak millrace's language (it began with {head!r})")
    if length > _LONGEST_BYTES:
        raise WorkerError(f"sent {length} bytes where a handshake has at most {_LONGEST_BYTES}")
    return _object((yield length))


def _framed(fields: Fields) -> bytes:
    content = json.dumps(fields).encode()
    if len(content) > _LONGEST_BYTES:
        raise SettingError(f"a hello of {len(content)} bytes does not fit into {_LONGEST_BYTES}. Send it afterwards.")
    return _HEAD.pack(_MAGIC, len(content)) + content


def _object(content: bytes) -> Fields:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise WorkerError("sent a damaged handshake")
    return fields


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise WorkerError(f"sent a handshake without its {name}")
    return value


def _equal(said: str, expected: str) -> bool:
    """In a time that does not tell where they differ. said: any text, also one that is no Unicode."""
    return hmac.compare_digest(said.encode(errors="surrogatepass"), expected.encode())


def _proof(token: bytes, side: str, dialers: str, listeners: str, hello: str) -> str:
    if len(token) < _SHORTEST_TOKEN_BYTES:
        raise SettingError(
            f"a run's token has at least {_SHORTEST_TOKEN_BYTES} bytes; got {len(token)}. See `new_token`."
        )
    # As JSON, so that no part can pass for a piece of another one.
    return hmac.digest(token, json.dumps([side, __version__, dialers, listeners, hello]).encode(), "sha256").hex()


def _other_version(fields: Fields) -> str:
    return (
        f"is millrace {str(fields.get('version'))[:40]!r} where this is {__version__!r}: install the same version on "
        "all machines of a run"
    )
