"""To whom a token is shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.runtime import ray_token
from millrace.runtime.ray_token import offer_token, protect, unprotect

HERE = ["local", "127.0.0.1:6379", "ray://localhost:10001", "http://127.0.0.1:8265", "http://[::1]:8265"]
ELSEWHERE = ["10.0.0.5:6379", "ray://head:10001", "http://head:8265", "127.0.0.1.evil.org:6379", "http://[", ""]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is said yet, and there is a token at home."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    monkeypatch.setattr(ray_token, "_set_by_us", set())
    return tmp_path


def mode(address: str) -> str | None:
    offer_token(address)
    return os.environ.get("RAY_AUTH_MODE")


@pytest.mark.parametrize("address", HERE)
def test_the_token_of_this_machine_is_shown_here(address: str) -> None:
    assert mode(address) == "token"


@pytest.mark.parametrize("address", ELSEWHERE)
def test_and_nowhere_else(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode(address) is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert mode(address) == "token", "this one was given for it"


def test_without_one_and_against_the_users_word(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray" / "auth_token").unlink()
    assert mode("local") is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "x")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert mode("local") == "disabled"


def test_what_was_shown_here_is_not_shown_elsewhere_later(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode("local") == "token"
    assert mode("10.0.0.5:6379") is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert mode("10.0.0.5:6379") == "token", "the user has said so"


def test_a_made_token_goes_with_its_ray(home: Path) -> None:
    (home / ".ray" / "auth_token").unlink()
    protect()
    made = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert mode("10.0.0.5:6379") is None, "it is not the user's, for that cluster"
    unprotect()
    assert "RAY_AUTH_TOKEN" not in os.environ
    protect()
    assert os.environ["RAY_AUTH_TOKEN"] == made, "Ray would read another one no more"
    unprotect()


def test_a_users_token_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    protect()
    unprotect()
    assert os.environ["RAY_AUTH_TOKEN"] == "b" * 64
    assert "RAY_AUTH_MODE" not in os.environ
