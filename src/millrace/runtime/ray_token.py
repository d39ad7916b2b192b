"""Whether Ray is to prove itself to a cluster by its token. Without Ray: it reads this when it is imported."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

_MODE = "RAY_AUTH_MODE"
_GIVEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def offer_token(address: str) -> None:
    """Have Ray show its token to the cluster at `address`, unless the user has said otherwise by RAY_AUTH_MODE.

    A token in the environment is meant for the cluster that is named. The one that Ray keeps in the home directory is
    of this machine's clusters, and is shown to no other.
    """
    if any(os.environ.get(name) for name in _GIVEN) or (_is_here(address) and _kept().exists()):
        os.environ.setdefault(_MODE, "token")


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
