"""One device's part in a made-up partition, for threads of a test and for processes of their own.

    transport_peer.py   reads a JSON object per line: {"call": NAME, …}; answers each with one

What edges there are and what they carry follows from a seed, so that nothing but the seed has to be told.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.errors import MillraceError
from millrace.graph.signature import TensorSpec
from millrace.partition.program import Edge
from millrace.place.wire import CODECS
from millrace.runtime.transport import gloo, shared_memory
from millrace.runtime.transport.base import Transport
from millrace.runtime.transport.codecs import decode, encode

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8),
    *(torch.bool, torch.complex64, torch.complex128),
)
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 4), (129,), (70, 130), (4000,))


def devices(count: int) -> list[str]:
    return [f"/host:0/cpu:{number}" for number in range(count)]


def edges(seed: int, names: Sequence[str], count: int) -> list[Edge]:
    """Random edges between these devices; some of those with floating numbers have a codec."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        source, target = chance.sample(list(names), 2)
        spec = TensorSpec(chance.choice(SHAPES), chance.choice(DTYPES))
        codec = chance.choice((None, *CODECS)) if spec.dtype.is_floating_point else None
        found.append(Edge(number, source, target, f"value_{number}", spec, codec))
    return found


def tensor(edge: Edge, step: int) -> Tensor:
    """What an edge carries in a step: any bits (NaN, too), often with strides of its own.

    On an edge with a codec it is finite, with more or fewer zeros, so that codes of all lengths occur.
    """
    generator = torch.Generator().manual_seed(1_000_003 * edge.number + step)
    shape = edge.spec.shape
    strided = len(shape) >= 2 and (edge.number + step) % 2 == 0
    made = shape[::-1] if strided else shape
    if edge.spec.dtype == torch.bool:
        values = torch.randint(0, 2, made, generator=generator).bool()
    else:
        extent = edge.spec.dtype.itemsize
        values = torch.randint(0, 256, (*made, extent), generator=generator, dtype=torch.uint8)
        values = values.view(edge.spec.dtype).squeeze(-1)
    if edge.codec is not None:
        zeros = torch.rand(made, generator=generator) < ((edge.number + step) % 4) / 3
        values = torch.randn(made, generator=generator).to(edge.spec.dtype).masked_fill(zeros, 0.0)
    return values.permute(*reversed(range(len(shape)))) if strided else values


def arriving(edge: Edge, step: int) -> Tensor:
    """What of it arrives."""
    sent = tensor(edge, step)
    if edge.codec is None:
        return sent
    out = torch.empty(edge.spec.shape, dtype=edge.spec.dtype)
    decode(edge.codec, encode(edge.codec, sent), out)
    return out


def bits(values: Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def whole_step(transport: Transport, step: int, timeout_s: float = 20.0) -> int:
    """Send and receive everything, each in an order of its own; how many tensors arrived and were right."""
    transport.begin_step(step)
    chance = random.Random(f"{transport.device} {step}")
    for edge in chance.sample(list(transport.outgoing.values()), len(transport.outgoing)):
        sent = tensor(edge, step).clone(memory_format=torch.preserve_format)
        transport.send(edge.number, sent)
        sent.zero_()  # the sender may do so
    received = {}
    for edge in chance.sample(list(transport.incoming.values()), len(transport.incoming)):
        received[edge] = transport.recv(edge.number, timeout_s)
    for edge, found in received.items():
        assert edge.spec.fits(found), f"{edge} brought {found.dtype}{list(found.shape)}"
        assert found.is_contiguous()
        assert bits(found) == bits(arriving(edge, step)), f"{edge} brought other values in step {step}"
    return len(received)


def part_of_step(transport: Transport, step: int) -> None:
    """A step that is given up: some sends, and some receives of what is sent."""
    transport.begin_step(step)

    def chosen(edge: Edge, doing: str, probability: float) -> bool:
        return random.Random(f"{doing} {edge.number} {step}").random() < probability

    for edge in transport.outgoing.values():
        if chosen(edge, "send", 0.7):
            transport.send(edge.number, tensor(edge, step))
    for edge in transport.incoming.values():
        if chosen(edge, "send", 0.7) and chosen(edge, "recv", 0.5):
            assert bits(transport.recv(edge.number, 20.0)) == bits(arriving(edge, step))


def connect(kind: str, device: str, names: Sequence[str], all_edges: Sequence[Edge], place: Path) -> Transport:
    if kind == "gloo":
        return gloo.connect(device, names, all_edges, place / "store", timeout_s=20.0)
    return shared_memory.connect(device, all_edges, place, timeout_s=20.0)


class Peer:
    """Answers the calls that a test makes."""

    def __init__(self) -> None:
        self.transport: Transport

    def connect(self, kind: str, device: str, count: int, seed: int, edge_count: int, place: str) -> str:
        names = devices(count)
        self.transport = connect(kind, device, names, edges(seed, names, edge_count), Path(place))
        return "connected"

    def step(self, number: int, timeout_s: float = 20.0) -> int:
        return whole_step(self.transport, number, timeout_s)

    def begin(self, number: int) -> str:
        self.transport.begin_step(number)
        return "begun"

    def recv(self, edge: int, timeout_s: float) -> str:
        return bits(self.transport.recv(edge, timeout_s)).hex()

    def maps(self) -> str:
        return Path("/proc/self/maps").read_text()

    def close(self) -> str:
        self.transport.close()
        return "closed"


def main() -> None:
    torch.set_num_threads(1)
    peer = Peer()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        try:
            answer = {"answer": getattr(peer, asked.pop("call"))(**asked)}
        except MillraceError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
