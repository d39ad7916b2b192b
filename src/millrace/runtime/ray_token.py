"""Whether Ray is to prove itself to a cluster by its token. Without Ray: it reads this when it is imported."""

from __future__ import annotations

import functools
import ipaddress
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_GIVEN = (_TOKEN, "RAY_AUTH_TOKEN_PATH")
_set_by_us: set[str] = set()  # variables of the environment


def offer_token(address: str) -> None:
    """Have Ray show its token to the cluster at `address`, unless the user has said otherwise by RAY_AUTH_MODE.

    A token in the environment is meant for the cluster that is named. The one that Ray keeps in the home directory is
    of this machine's clusters, and is shown to no other; nor is one that was made for a Ray of this process.
    """
    given = any(os.environ.get(name) for name in _GIVEN if name not in _set_by_us)
    if given or (_is_here(address) and _kept().exists()):
        _set(_MODE, "token")
    else:
        _unset(_MODE)


def protect() -> None:
    """Have a Ray that we start ask for a token, without which nobody may use it: a made one where the user has none,
    rather than one that Ray would put into the home directory. `unprotect` when it has ended."""
    _set(_MODE, "token")  # as Ray would, which would leave it so
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not _kept().exists():
        _set(_TOKEN, _made())


def unprotect() -> None:
    """Forget what `protect` and `offer_token` have set."""
    _unset(_TOKEN)
    _unset(_MODE)


@functools.cache
def _made() -> str:
    """The same for every Ray of this process, as Ray reads it once."""
    return secrets.token_hex(32)


def _set(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = value
        _set_by_us.add(name)


def _unset(name: str) -> None:
    if name in _set_by_us:
        _set_by_us.remove(name)
        os.environ.pop(name, None)


def _kept() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _is_here(address: str) -> bool:
    if address == "local":
        return True
    try:
        host = urlsplit(address if "://" in address else f"gcs://{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
