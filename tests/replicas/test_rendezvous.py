"""The store in the driver where the members of a group find each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.two_hosts import hosts

from millrace.replicas.rendezvous import GRACE_S, Rendezvous, StoreAddress

SOON_S = 2.0  # on a busy machine; who asks for names in vain takes 3 s or more


@pytest.fixture
def address() -> Iterator[StoreAddress]:
    before = threading.active_count()
    with closing(Rendezvous()) as rendezvous:
        yield rendezvous.address
    assert threading.active_count() == before


def test_what_one_has_set_the_others_of_its_generation_get(address: StoreAddress) -> None:
    one, other, later = (address.connect(generation, 5.0) for generation in (1, 1, 2))
    found: list[bytes] = []
    waits = threading.Thread(target=lambda: found.append(other.get("key")))
    waits.start()
    later.set("key", b"later")
    time.sleep(0.1)
    assert found == []
    one.set("key", bytes(range(256)))
    waits.join(5.0)
    assert found == [bytes(range(256))] == [one.get("key")]
    assert later.get("key") == b"later"
    one.set("key", "anew")
    assert other.get("key") == b"anew"


def test_a_key_that_nobody_sets_is_waited_for_in_vain_but_not_for_ever(address: StoreAddress) -> None:
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not answer within 1\.2 s"):
        address.connect(1, 0.2).get("key")
    assert 0.2 + GRACE_S <= time.monotonic() - began_s < 0.2 + GRACE_S + SOON_S


def test_who_does_not_know_the_secret_is_refused_and_disturbs_nobody(address: StoreAddress) -> None:
    member = address.connect(1, 5.0)
    with pytest.raises(RuntimeError, match="another token"):
        replace(address, secret="00" * 32).connect(1, 5.0)
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"mill"):
        stranger = socket.create_connection((address.host, address.port))
        stranger.sendall(content)
    member.set("key", b"value")
    assert address.connect(1, 5.0).get("key") == b"value"


def test_a_store_that_has_gone_is_told_of(address: StoreAddress) -> None:
    rendezvous = Rendezvous()
    member = rendezvous.address.connect(1, 5.0)
    rendezvous.close()
    rendezvous.close()
    with pytest.raises(RuntimeError, match="the driver has ended"):
        member.get("key")
    with pytest.raises(RuntimeError, match="nobody answers"):
        rendezvous.address.connect(1, 5.0)


FORMS_A_GROUP = """
import json, sys, threading, time
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.rendezvous import Rendezvous

host = sys.argv[1]
began_s = time.monotonic()
rendezvous = Rendezvous(host)
more = {"abandoned": lambda: False, "timeout_s": 60.0, "host": host}
groups = []

def join(rank):
    groups.append(GlooGroup(rendezvous.address, 1, rank, 2, **more))

ranks = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
print(json.dumps([len(groups), time.monotonic() - began_s]))
"""


def test_a_name_server_that_does_not_answer_keeps_no_group_waiting(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with hosts(tmp_path, "near", name_server=False) as (_, (near,)):
        asks = near.start([sys.executable, "-c", FORMS_A_GROUP, near.address], environment, subprocess.PIPE)
        said, _ = asks.communicate(timeout=60.0)
    formed, took_s = json.loads(said)
    assert formed == 2
    assert took_s < SOON_S
