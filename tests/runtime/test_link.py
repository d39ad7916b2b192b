"""Messages over a connection that never waits come out as they went in, however the bytes were cut on the way."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.runtime.link import Link
from millrace.runtime.messages import Message, pieces, receive, send

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    tensors = {
        f"t{at}": torch.arange(24).to(dtype)[: int(torch.Size(shape).numel())].reshape(shape)
        for at, (dtype, shape) in enumerate(draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=3)))
        if torch.Size(shape).numel() <= 24
    }
    fields = draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9) | st.none(), max_size=3))
    return Message(draw(st.text(max_size=8)), fields, tensors)


def same(one: Message, other: Message) -> bool:
    def bits(tensors: dict[str, Tensor]) -> list[object]:
        return [
            (n, t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist() if t.numel() else [])
            for n, t in tensors.items()
        ]

    return (one.kind, dict(one.fields), bits(dict(one.tensors))) == (
        other.kind,
        dict(other.fields),
        bits(dict(other.tensors)),
    )


@contextlib.contextmanager
def ends() -> Iterator[tuple[socket.socket, Link]]:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    with contextlib.closing(link), theirs:
        yield theirs, link


@settings(deadline=None)
@given(sent=st.lists(messages(), min_size=1, max_size=4), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_whatever_pieces_arrive_messages_come_out_whole_and_in_order(sent: list[Message], cuts: list[int]) -> None:
    content = b"".join(bytes(piece) for message in sent for piece in pieces(message))
    found: list[Message] = []
    with ends() as (theirs, link):
        at = turn = 0
        while at < len(content):
            size = cuts[turn % len(cuts)]
            theirs.sendall(content[at : at + size])
            got, more = link.read()
            assert more
            found += got
            at, turn = at + size, turn + 1
        while len(found) < len(sent):  # one read takes only so many pieces
            found += link.read()[0]
    assert len(found) == len(sent)
    assert all(same(a, b) for a, b in zip(found, sent, strict=True))


@settings(deadline=None)
@given(sent=st.lists(messages(), max_size=4))
def test_what_is_sent_is_what_the_waiting_side_receives(sent: list[Message]) -> None:
    with ends() as (theirs, link):
        for message in sent:
            assert link.send(message)
        assert all(same(receive(theirs, 1.0, "the link"), message) for message in sent)


def test_sending_does_not_wait_for_one_who_does_not_read() -> None:
    x = torch.arange(2_000_000)
    with ends() as (theirs, link):
        assert not link.send(Message("first", {}, {"x": x, "y": x + 1}))
        assert not link.send(Message("second"))
        theirs.setblocking(False)
        other, found = Link(theirs), list[Message]()
        while len(found) < 2:
            link.flush()
            found += other.read()[0]
        assert link.flush()
        assert [m.kind for m in found] == ["first", "second"]
        assert torch.equal(found[0].tensors["x"], x)
        assert torch.equal(found[0].tensors["y"], x + 1)


def test_an_end_is_told_after_the_last_message_and_sending_to_it_does_nothing() -> None:
    with ends() as (theirs, link):
        send(theirs, Message("last"), 1.0, "the link")
        theirs.sendall(b"half")
        theirs.close()
        found, more = link.read()
        assert [m.kind for m in found] == ["last"]
        assert not more
        assert link.send(Message("too late"))
        link.close()
        assert link.send(Message("much too late"))


def test_what_has_moved_of_a_message_is_counted_before_it_is_whole() -> None:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Link(ours)) as link:
        content = b"".join(pieces(Message("values", {}, {"w": torch.ones(100)})))
        theirs.sendall(content[:50])
        assert link.read() == ([], True)
        assert link.moved_bytes == 50
        theirs.sendall(content[50:])
        assert link.read()[0][0].kind == "values"
        assert link.moved_bytes == len(content)
