"""What all transports have in common, with a thread for each device."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtime import transport_peer as peer

from millrace.errors import GraphError, SettingError, WorkerError
from millrace.graph.signature import TensorSpec
from millrace.partition.program import Edge
from millrace.runtime.transport import base, gloo, in_process, shared_memory, slots
from millrace.runtime.transport.base import Transport
from millrace.runtime.transport.codecs import encode

KINDS = ["in_process", "shared_memory", "gloo"]
Result = TypeVar("Result")


class Workers:
    """A transport and a thread for each device."""

    def __init__(self, kind: str, names: Sequence[str], edges: Sequence[Edge], place: Path) -> None:
        self._threads = ThreadPoolExecutor(len(names))
        if kind == "in_process":
            self.transports: list[Transport] = list(in_process.connect(names, edges).values())
        else:
            self.transports = list(
                self._threads.map(lambda device: peer.connect(kind, device, names, edges, place), names)
            )

    def each(self, do: Callable[[Transport], Result]) -> list[Result]:
        return list(self._threads.map(do, self.transports))

    def close(self) -> None:
        self.each(lambda transport: transport.close())
        self._threads.shutdown()


@contextmanager
def workers(kind: str, names: Sequence[str], edges: Sequence[Edge]) -> Iterator[Workers]:
    with tempfile.TemporaryDirectory(prefix="millrace-test-") as place:
        found = Workers(kind, names, edges, Path(place))
        try:
            yield found
        finally:
            found.close()


def one_edge(spec: TensorSpec | None = None) -> list[Edge]:
    return [Edge(0, "/host:0/cpu:0", "/host:0/cpu:1", "hidden", spec or TensorSpec((3,), torch.float32))]


many = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS)
@many
@given(count=st.integers(2, 4), edge_count=st.integers(1, 25), seed=st.integers(0, 10**6))
def test_every_tensor_arrives_bit_for_bit(kind: str, count: int, edge_count: int, seed: int) -> None:
    names = peer.devices(count)
    with workers(kind, names, peer.edges(seed, names, edge_count)) as here:
        for step in range(3):
            arrived = here.each(lambda transport, step=step: peer.whole_step(transport, step))
            assert sum(arrived) == edge_count


@pytest.mark.parametrize("kind", KINDS)
@many
@given(count=st.integers(2, 3), seed=st.integers(0, 10**6), given_up=st.lists(st.booleans(), min_size=1, max_size=5))
def test_messages_of_given_up_steps_are_dropped(kind: str, count: int, seed: int, given_up: list[bool]) -> None:
    names = peer.devices(count)
    with workers(kind, names, peer.edges(seed, names, 12)) as here:
        for step, gives_up in enumerate([*given_up, False]):
            if gives_up:
                here.each(lambda transport, step=step: peer.part_of_step(transport, step))
            else:
                here.each(lambda transport, step=step: peer.whole_step(transport, step))


@pytest.mark.parametrize("kind", KINDS)
def test_more_edges_than_a_socket_holds_messages(kind: str) -> None:
    names = peer.devices(2)
    edges = [Edge(n, names[0], names[1], f"v{n}", TensorSpec((2,), torch.int64)) for n in range(1500)]
    with workers(kind, names, edges) as here:
        for transport in here.transports:
            transport.begin_step(0)
        for edge in edges:
            here.transports[0].send(edge.number, peer.tensor(edge, 0))
        for edge in reversed(edges):
            assert torch.equal(here.transports[1].recv(edge.number, 20.0), peer.tensor(edge, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_for_several_devices_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, spec, encoded = peer.devices(4), TensorSpec((3000,), torch.float32), []
    edges = [Edge(n, names[0], names[n + 1], "hidden", spec, "zeros") for n in range(3)]
    monkeypatch.setattr(base, "encode", lambda codec, tensor: encoded.append(codec) or encode(codec, tensor))
    with workers(kind, names, edges) as here:
        for step, zeros in enumerate((0.9, 0.2, 0.0, 0.5)):  # shorter, longer, not at all
            values = torch.where(torch.rand(3000) < zeros, 0.0, torch.rand(3000) + 1)
            here.each(lambda transport, step=step: transport.begin_step(step))
            sent = values.clone()
            for edge in edges:
                here.transports[0].send(edge.number, sent)
            sent.zero_()
            for edge, target in zip(edges, here.transports[1:], strict=True):
                assert torch.equal(target.recv(edge.number, 20.0), values)
            expected = min(12000, 4 * int(values.count_nonzero()) + 375)
            assert here.transports[0].sent_bytes == dict.fromkeys(range(3), expected)
            assert len(encoded) == (1 if zeros else 3)
            encoded.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_ends_with_its_time_and_says_who_waited_for_what(kind: str) -> None:
    with workers(kind, peer.devices(2), one_edge()) as here:
        here.each(lambda transport: transport.begin_step(7))
        with pytest.raises(WorkerError) as raised:
            here.transports[1].recv(0, 0.05)
    for part in ("/host:0/cpu:1 waited", "0.05 s", "step 7", "'hidden'", "f32[3]", "from /host:0/cpu:0"):
        assert part in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_closes_ends_a_wait(kind: str) -> None:
    with workers(kind, peer.devices(2), one_edge()) as here:
        here.each(lambda transport: transport.begin_step(0))

        def close_or_wait(transport: Transport) -> str:
            if transport is here.transports[0]:
                return str(transport.close())
            with pytest.raises(WorkerError) as raised:
                transport.recv(0, 60.0)
            return str(raised.value)

        assert "/host:0/cpu:1: the connection with /host:0/cpu:0" in here.each(close_or_wait)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_in_a_step_that_the_sender_has_left_hears_of_it(kind: str) -> None:
    with workers(kind, peer.devices(2), one_edge()) as here:
        here.transports[1].begin_step(0)
        here.transports[0].begin_step(1)
        here.transports[0].send(0, torch.ones(3))
        with pytest.raises(WorkerError, match=r"waited in step 0 .* already in step 1"):
            here.transports[1].recv(0, 20.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_an_edge_is_refused(kind: str) -> None:
    with workers(kind, peer.devices(2), one_edge()) as here:
        source, target = here.transports
        source.begin_step(3)
        for wrong in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
            with pytest.raises(GraphError, match=r"carries f32\[3\]"):
                source.send(0, wrong)
        with pytest.raises(GraphError, match="does not begin there"):
            target.send(0, torch.ones(3))
        with pytest.raises(GraphError, match="does not end there"):
            source.recv(0, 1.0)
        for step in (3, 2):
            with pytest.raises(WorkerError, match="greater number"):
                source.begin_step(step)


@pytest.mark.parametrize("kind", KINDS)
def test_lazy_conjugates_and_negatives_arrive_as_values(kind: str) -> None:
    values = torch.randn(3, dtype=torch.complex64)
    with workers(kind, peer.devices(2), one_edge(TensorSpec((3,), torch.complex64))) as here:
        for step, sent in zip(itertools.count(), (values.conj(), values.conj().imag + 0j, -values), strict=False):
            here.each(lambda transport, step=step: transport.begin_step(step))
            here.transports[0].send(0, sent)
            assert torch.equal(here.transports[1].recv(0, 20.0), sent.resolve_conj().resolve_neg())


@pytest.mark.parametrize("kind", ["in_process", "shared_memory"])
def test_receiving_is_possible_after_a_given_up_wait(kind: str) -> None:
    with workers(kind, peer.devices(2), one_edge()) as here:
        here.each(lambda transport: transport.begin_step(0))
        with pytest.raises(WorkerError):
            here.transports[1].recv(0, 0.01)
        here.each(lambda transport: transport.begin_step(1))
        here.transports[0].send(0, torch.arange(3.0))
        assert torch.equal(here.transports[1].recv(0, 20.0), torch.arange(3.0))


def test_gloo_after_a_time_out_refuses_and_says_so() -> None:
    with workers("gloo", peer.devices(2), one_edge()) as here:
        here.each(lambda transport: transport.begin_step(0))
        with pytest.raises(WorkerError):
            here.transports[1].recv(0, 0.01)
        with pytest.raises(WorkerError, match="the connection with /host:0/cpu:0"):
            here.transports[1].begin_step(1)


def test_a_worker_that_does_not_come_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for at, device in enumerate(peer.devices(2)):
        other = peer.devices(2)[1 - at]
        with pytest.raises(WorkerError, match=f"{device} found no connection with {other}"):
            shared_memory.connect(device, one_edge(), tmp_path, timeout_s=0.05)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(WorkerError, match="/host:0/cpu:0 could not connect with /host:0/cpu:1"):
        gloo.connect("/host:0/cpu:0", peer.devices(2), one_edge(), tmp_path / "store", timeout_s=0.1)


def test_workers_with_other_edges_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    theirs = one_edge(TensorSpec((4,), torch.float32))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(shared_memory.connect, "/host:0/cpu:0", theirs, tmp_path, 5.0)
        with pytest.raises(WorkerError, match=r"other edges|no connection"):
            shared_memory.connect("/host:0/cpu:1", one_edge(), tmp_path, timeout_s=5.0)
        with pytest.raises(WorkerError, match=r"other edges|no connection"):
            other.result()


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(SettingError, match="0700"):
        shared_memory.connect("/host:0/cpu:0", one_edge(), tmp_path, timeout_s=0.1)


def test_a_directory_that_was_used_before_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "0").touch()
    with pytest.raises(WorkerError, match="new directory"):
        shared_memory.connect("/host:0/cpu:0", one_edge(), tmp_path, timeout_s=0.1)


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(WorkerError, match="could not be had"):
        slots.allocate("/host:0/cpu:0", one_edge(TensorSpec((2**45,), torch.float32)))


@many
@given(seed=st.integers(0, 10**6), count=st.integers(0, 40))
def test_slots_are_aligned_and_apart(seed: int, count: int) -> None:
    edges = peer.edges(seed, peer.devices(2), count)
    offsets, size_bytes = slots.layout(edges)
    ends = [*sorted(offsets.values()), size_bytes]
    for edge in edges:
        offset = offsets[edge.number]
        assert offset % 64 == 0
        assert offset + 64 + edge.carried.size_bytes <= ends[ends.index(offset) + 1]
