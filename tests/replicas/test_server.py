"""Servers and their clients, in threads of one process: over shared memory and over TCP."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.replicas.counting import TOKEN, address_in, attach_copy, connected, counting_server, served
from torch import Tensor, nn

from millrace.errors import FeedError, FetchError, WorkerError
from millrace.graph.passes.halves import halves
from millrace.graph.passes.row_update import row_update
from millrace.graph.signature import Role
from millrace.graph.training import training_graph
from millrace.replicas.push_frame import Push, encode
from millrace.replicas.server import ShardServer
from millrace.replicas.server_client import Receipt, ShardClient
from millrace.replicas.shard_clients import ShardClients
from millrace.replicas.shard_events import Async, Sync
from millrace.replicas.shard_store import Rows, ShardStore, Staged
from millrace.runtime import handshake

KINDS = ("unix", "tcp")
both = pytest.mark.parametrize("kind", KINDS)


def rows_of(client: ShardClient, table: str, rows: Tensor, step: int = 0) -> Tensor:
    spec = client.tables[table]
    values = torch.empty((len(rows), *spec.shape[1:]), dtype=spec.dtype)
    client.fetch({}, step, {table: Rows(rows, values)})
    return values


@both
def test_what_is_pushed_is_added_once_and_fetched(kind: str, tmp_path: Path) -> None:
    with (
        served(counting_server("shard 0", {"a": 7, "b": 3}), address_in(tmp_path, kind)) as address,
        connected(address, "w0") as client,
    ):
        ones = {"a": torch.ones(7), "b": torch.full((3,), 2.0)}
        assert client.push(ones, 1, 0, 0) == Receipt(True, 1, 0)
        assert client.push(ones, 1, 0, 0) == Receipt(True, 1, 0)  # again
        assert client.push(ones, 2, 0, 0) == Receipt(True, 2, 1)
        into = {"b": torch.empty(3), "a": torch.empty(7)}
        assert client.fetch(into) == 2
        assert into["a"].tolist() == [2.0] * 7
        assert into["b"].tolist() == [4.0] * 3


@both
def test_sync_takes_the_mean_by_examples_and_drops_the_late_one(kind: str, tmp_path: Path) -> None:
    server = counting_server("shard 0", {"a": 4}, Sync(2), ("w0", "w1", "w2"))
    with served(server, address_in(tmp_path, kind)) as address:
        clients = [connected(address, f"w{i}") for i in range(3)]
        clients[1].push({"a": torch.full((4,), 4.0)}, 1, 0, 0, slice=1, examples=1)
        clients[0].push({"a": torch.full((4,), 8.0)}, 1, 0, 0, slice=0, examples=3)
        late = clients[2].push({"a": torch.ones(4)}, 1, 0, 0, slice=2)
        assert not late.applied
        assert "late" in late.why
        into = {"a": torch.empty(4)}
        assert clients[2].fetch(into, step=1) == 1
        assert into["a"].tolist() == [7.0] * 4
        assert server.report()["dropped"] == 1
        for client in clients:
            client.close()


def test_a_fetch_waits_for_the_step_before(tmp_path: Path) -> None:
    with served(counting_server("shard 0", {"a": 4}, Sync(2)), address_in(tmp_path, "unix")) as address:
        one, other = (connected(address, f"w{i}") for i in range(2))
        one.push({"a": torch.ones(4)}, 1, 0, 0, slice=0)
        into = {"a": torch.empty(4)}
        one.start_fetch(into, step=1)
        other.push({"a": torch.zeros(4)}, 1, 0, 0, slice=1)
        assert one.finish_fetch() == 1
        assert into["a"].tolist() == [0.5] * 4
        one.close()
        other.close()


def test_a_wait_ends_and_names_whom_it_was_for(tmp_path: Path) -> None:
    with (
        served(counting_server("shard 7", {"a": 4}, Sync(2)), address_in(tmp_path, "unix")) as address,
        connected(address, "w0", timeout_s=0.2) as client,
    ):
        client.push({"a": torch.ones(4)}, 1, 0, 0, slice=3)
        says = r"shard 7 let w0 wait 0.2 s for the variables of step 1.*2 slices are needed, those here: 3"
        with pytest.raises(WorkerError, match=says):
            client.fetch({"a": torch.empty(4)}, step=1)
        assert client.fetch({"a": torch.empty(4)}, step=0) == 0  # the connection is still good


@both
def test_nobody_reads_half_an_update(kind: str, tmp_path: Path) -> None:
    size = 200_000
    with served(counting_server("shard 0", {"a": size, "b": size}), address_in(tmp_path, kind)) as address:
        stop = threading.Event()

        def write(name: str) -> None:
            with connected(address, name) as client:
                ones, sequence = {"a": torch.ones(size), "b": torch.ones(size)}, 0
                while not stop.is_set():
                    sequence += 1
                    client.push(ones, sequence, 0, 0)

        writers = [threading.Thread(target=write, args=(f"writer {i}",)) for i in range(2)]
        for writer in writers:
            writer.start()
        into = {"a": torch.empty(size), "b": torch.empty(size)}
        versions = []
        with connected(address, "reader") as client:
            until_s = time.monotonic() + 1.5
            while time.monotonic() < until_s:
                versions.append(client.fetch(into))
                for tensor in into.values():
                    assert float(tensor.min()) == float(tensor.max()) == versions[-1]
        stop.set()
        for writer in writers:
            writer.join(10.0)
        assert len(set(versions)) > 3
        assert versions == sorted(versions)


@both
def test_rows_of_a_table_are_updated_as_the_optimizer_does(kind: str, tmp_path: Path) -> None:
    table = nn.Embedding(50, 3, dtype=torch.float64)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    graph = training_graph(table, lambda model, batch: model(batch).sum(), optimizer, torch.tensor([1, 2]))
    update = halves(graph).update
    (name,) = (variable.name for variable in update.variables if variable.role == Role.PARAMETER)
    server = ShardServer(ShardStore("shard 0", graph.initial, row_update(update, {name: 2})), Async())
    expected = nn.Parameter(table.weight.detach().clone())
    dense = torch.optim.Adagrad([expected], lr=0.1)
    rows = torch.tensor([4, 9, 4, 30])
    with served(server, address_in(tmp_path, kind)) as address, connected(address, "w0") as client:
        assert list(client.tables) == [name]
        for step in range(3):
            values = torch.randn(4, 3, dtype=torch.float64)
            client.push({}, step + 1, step, step, rows={name: Rows(rows, values)})
            expected.grad = torch.zeros_like(expected).index_add_(0, rows, values)
            dense.step()
        torch.testing.assert_close(rows_of(client, name, torch.arange(50)), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [5, 400])
@pytest.mark.parametrize("kind", ["ascending", "in any order", "some twice"])
def test_gradients_of_a_row_that_is_named_twice_are_summed(count: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randperm(1000, generator=generator)[:count]
    rows = rows.sort().values if kind == "ascending" else rows
    rows = torch.cat([rows, rows[: count // 2]]) if kind == "some twice" else rows
    values = torch.randn(len(rows), 2, generator=generator)
    server = counting_server("shard 0", {"a": 2}, tables={"t": (1000, 2)})
    server.shard.store.apply([Staged({}, {"t": Rows(rows, values)})], [1.0], 1)
    expected = torch.zeros(1000, 2).index_add_(0, rows, values)
    torch.testing.assert_close(server.shard.store.tensor("t"), expected)


def test_rows_of_several_workers_are_averaged_with_what_is_dense(tmp_path: Path) -> None:
    server = counting_server("shard 0", {"a": 2}, Sync(2), tables={"t": (5, 2)})
    with served(server, address_in(tmp_path, "unix")) as address:
        one, other = (connected(address, f"w{i}") for i in range(2))
        ones = Rows(torch.tensor([1, 3]), torch.ones(2, 2))
        one.push({"a": torch.ones(2)}, 1, 0, 0, slice=0, rows={"t": ones})
        other.push({"a": torch.ones(2)}, 1, 0, 0, slice=1, rows={"t": Rows(torch.tensor([3]), torch.ones(1, 2))})
        assert rows_of(one, "t", torch.arange(5), step=1)[:, 0].tolist() == [0.0, 0.5, 0.0, 1.0, 0.0]
        into = {"a": torch.empty(2)}
        assert other.fetch(into, step=1) == 1
        assert into["a"].tolist() == [1.0, 1.0]
        one.close()
        other.close()


@both
def test_what_does_not_fit_is_refused_and_the_connection_goes_on(kind: str, tmp_path: Path) -> None:
    server = counting_server("shard 0", {"a": 4}, tables={"t": (5, 2)})
    with (
        served(server, address_in(tmp_path, kind)) as address,
        connected(address, "w0") as client,
    ):
        with pytest.raises(FeedError, match="5 rows, asked for 2 to 5"):
            rows_of(client, "t", torch.tensor([2, 5]))
        with pytest.raises(FeedError, match="expected, got"):
            client.push({}, 1, 0, 0, rows={"t": Rows(torch.tensor([2]), torch.ones(1, 3))})
        with pytest.raises(FetchError, match="no table 'x'"):
            client.fetch({}, rows={"x": Rows(torch.tensor([2]), torch.empty(1, 2))})
        with pytest.raises(FeedError, match="'a' for shard 0"):
            client.push({"a": torch.ones(5)}, 1, 0, 0)
        with pytest.raises(FetchError, match="no variable 'q'"):
            client.fetch({"q": torch.ones(5)})
        assert client.push({"a": torch.ones(4)}, 1, 0, 0).version == 1


@pytest.mark.parametrize("copy_kind", KINDS)
@both
def test_a_copy_has_what_the_shard_has(kind: str, copy_kind: str, tmp_path: Path) -> None:
    sizes, tables = {"a": 5}, {"t": (6, 2)}
    shard = counting_server("shard 0", sizes, Sync(2), tables=tables)
    copy = counting_server("copy of shard 0", sizes, Sync(1), tables=tables, is_copy=True)
    with (
        served(shard, address_in(tmp_path, kind)) as address,
        served(copy, address_in(tmp_path, copy_kind, "copy")) as copy_address,
    ):
        clients = [connected(address, f"w{i}") for i in range(2)]
        clients[0].push({"a": torch.ones(5)}, 1, 0, 0, slice=0)  # staged, before there is a copy
        attach_copy(shard, copy_address)
        clients[1].push({"a": torch.ones(5)}, 1, 0, 0, slice=1)
        for step in (1, 2):
            for number, client in enumerate(clients):
                client.fetch({"a": torch.empty(5)}, step=step)
                client.push({"a": torch.ones(5)}, step + 1, step, step, slice=number)
        shard.configure(Async(), ("w0",))
        clients[0].push({}, 4, 3, 3, rows={"t": Rows(torch.tensor([1, 1]), torch.ones(2, 2))})
        assert bytes(copy.shard.store.region.content()) == bytes(shard.shard.store.region.content())
        assert copy.shard.state.snapshot() == shard.shard.state.snapshot()
        assert shard.report() == {"version": 4, "dropped": 0, "copied": True}

        shard.close()
        copy.promote()
        for client in clients:
            client.move_to(copy_address)
        assert clients[1].push({"a": torch.ones(5)}, 3, 2, 2, slice=1).version == 3  # it knows: not applied again
        into = {"a": torch.empty(5)}
        assert clients[0].fetch(into) == 4
        assert into["a"].tolist() == [3.0] * 5
        for client in clients:
            client.close()


def test_a_copy_of_other_variables_is_refused(tmp_path: Path) -> None:
    copy = counting_server("copy", {"b": 5}, is_copy=True)
    with served(copy, address_in(tmp_path, "unix")) as address:
        shard = counting_server("shard 0", {"a": 5})
        with pytest.raises(WorkerError, match="did not say within"):
            attach_copy(shard, address, wait_s=0.5)
        with pytest.raises(WorkerError, match="before its copy had everything"):
            copy.promote()
        shard.close()


def test_a_copy_that_is_known_to_be_lost_holds_nobody_up(tmp_path: Path) -> None:
    """Its machine is gone: what is being sent to it is taken by nobody, and nothing says so."""
    size = 8_000_000
    shard = counting_server("shard 0", {"a": size})
    with (
        served(shard, address_in(tmp_path, "unix")) as address,
        contextlib.closing(handshake.listen("tcp:127.0.0.1:0")) as gone,
        ThreadPoolExecutor(2) as pool,
        connected(address, "w0") as client,
    ):
        accepted = pool.submit(gone.accept, TOKEN, 10.0)
        attaching = pool.submit(attach_copy, shard, gone.address)
        with accepted.result()[0]:
            time.sleep(0.3)  # it sends by now, under the lock
            assert not attaching.done()
            began_s = time.monotonic()
            shard.leave_copy("copy")
            assert client.push({"a": torch.ones(size)}, 1, 0, 0).version == 1
            assert time.monotonic() - began_s < 3.0  # it would have been patient for 5 s
            with pytest.raises(WorkerError, match="did not say within"):
                attaching.result()


def test_what_is_written_is_said_to_be_when_the_copy_has_it_or_is_lost(tmp_path: Path) -> None:
    shard, copy = counting_server("shard 0", {"a": 5}, Sync(2)), counting_server("copy", {"a": 5}, is_copy=True)
    with (
        served(shard, address_in(tmp_path, "unix")) as address,
        served(copy, address_in(tmp_path, "unix", "copy")) as copy_address,
        ThreadPoolExecutor(1) as pool,
        connected(address, "w0") as client,
    ):
        client.push({"a": torch.ones(5)}, 1, 0, 0, slice=0)  # staged, and is not to be applied by what is written
        attach_copy(shard, copy_address)
        shard.write({"a": torch.full((5,), 7.0)})
        assert copy.read()["a"].tolist() == [7.0] * 5
        assert copy.shard.state.snapshot() == shard.shard.state.snapshot()
        with copy.shard.still():  # it takes nothing
            writing = pool.submit(shard.write, {"a": torch.full((5,), 8.0)})
            time.sleep(0.3)
            assert not writing.done()
            shard.leave_copy("copy")
            writing.result(timeout=3.0)
        assert shard.read()["a"].tolist() == [8.0] * 5
        assert not shard.report()["copied"]
        shard.write({"a": torch.full((5,), 9.0)})  # alone


def test_a_push_that_stops_in_its_middle_ends_the_connection(tmp_path: Path) -> None:
    shard = counting_server("shard 0", {"a": 1000})
    with served(shard, address_in(tmp_path, "tcp")) as address, connected(address, "w1") as other:
        with connected(address, "w0", timeout_s=0.3) as slow:
            link = slow._live
            link.send_frame(encode(Push(1, 0, 0, 0, 1, 0.3, True, {}), []), 1.0)
            link.send_tensors([torch.ones(10)], 1.0)
            with pytest.raises(WorkerError):
                link.receive_any(5.0)
        assert other.push({"a": torch.ones(1000)}, 1, 0, 0).version == 1


def test_a_copy_gives_the_memory_of_lost_workers_back(tmp_path: Path) -> None:
    shard, copy = counting_server("shard 0", {"a": 5}), counting_server("copy", {"a": 5}, is_copy=True)
    with (
        served(shard, address_in(tmp_path, "unix")) as address,
        served(copy, address_in(tmp_path, "unix", "copy")) as copy_address,
    ):
        attach_copy(shard, copy_address)
        for number in range(4):
            with connected(address, f"w{number}") as client:
                client.push({"a": torch.ones(5)}, 1, number, number)
            while len(shard._links) > 1:  # until its connection has ended
                time.sleep(0.01)
        assert copy._copy_in is not None
        assert len(copy._copy_in._mailboxes) <= 2
        assert copy.read()["a"].tolist() == [4.0] * 5


def test_many_shards_at_once(tmp_path: Path) -> None:
    names = ["a", "b"]
    servers = [counting_server(f"shard {i}", {n: 3}, tables={f"t{i}": (4, 2)}) for i, n in enumerate(names)]
    with (
        served(servers[0], address_in(tmp_path, "unix", "0")) as first,
        served(servers[1], address_in(tmp_path, "unix", "1")) as second,
    ):
        shards = ShardClients([connected(a, "w0") for a in (first, second)])
        into = {name: torch.empty(3) for name in names}
        versions = shards.fetch(into)
        receipts = shards.push({"a": torch.ones(3), "b": torch.full((3,), 2.0)}, 1, 0, versions)
        assert [receipt.version for receipt in receipts] == [1, 1]
        assert shards.fetch(into) == [1, 1]
        assert [into[name].tolist() for name in names] == [[1.0] * 3, [2.0] * 3]
        rows = {"t1": Rows(torch.arange(2), torch.ones(2, 2)), "t0": Rows(torch.arange(3), torch.ones(3, 2))}
        assert shards.fetch(into, rows=rows) == [1, 1]
        assert not any(wanted.values.any() for wanted in rows.values())
        shards.close()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    def open_files() -> list[str]:
        gc.collect()
        names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sorted(os.readlink(name) for name in names if os.path.islink(name))

    def once() -> None:
        with (
            served(counting_server("shard 0", {"a": 1000}), address_in(tmp_path, "unix")) as address,
            connected(address, "w0") as client,
        ):
            client.push({"a": torch.ones(1000)}, 1, 0, 0)
        for thread in threading.enumerate():
            if thread.name in ("shard", "copy"):
                thread.join(5.0)

    once()
    before = open_files()
    for _ in range(3):
        once()
    assert len(open_files()) <= len(before), open_files()
    assert list(tmp_path.iterdir()) == []
