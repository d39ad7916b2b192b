"""Cluster files: what is written is read, and every mistake is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import PlacementError
from millrace.place.cluster import CLASSES, Cluster, Device, Link
from millrace.place.cluster_file import RATE_KEYS, parse_cluster, to_toml

DOCS = Path(__file__).parents[2] / "docs/clusters.md"
LINK = '[[link]]\nsource = "*"\ntarget = "*"\nlatency_s = 0\nbytes_per_s = 1e9\n'
TWO = '[[device]]\nname = "/host:0/gpu:[0-1]"\nlike = "t4"\n'
positive = st.floats(1e-9, 1e18)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    devices = []
    for index in range(draw(st.integers(1, 4))):
        rates = {c: draw(positive) for c in {*CLASSES, *draw(st.lists(st.sampled_from(RATE_KEYS), max_size=3))}}
        kind, memory = draw(st.sampled_from(["cpu", "cuda"])), draw(st.integers(1, 2**50))
        threads, busy = draw(st.integers(1, 64)), draw(st.dictionaries(st.sampled_from(RATE_KEYS), positive))
        devices.append(Device(f"/host:0/d:{index}", kind, memory, rates, draw(positive), threads, busy))
    shared, sender_copies = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    return Cluster(tuple(devices), (Link("*", "*", draw(positive), draw(positive), shared, sender_copies),))


@given(clusters())
def test_what_is_written_is_read(cluster: Cluster) -> None:
    assert parse_cluster(to_toml(cluster), "x") == cluster


def test_the_example_of_the_documentation() -> None:
    cluster = parse_cluster(DOCS.read_text().split("```toml")[1].split("```")[0], "x")
    assert len(cluster.devices) == 4
    assert cluster.device("gpu:2").rate("product", "bfloat16") == 8e12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[device]\n", "line 1"),
        ("", "at least one"),
        (TWO, "/host:0/gpu:0 to /host:0/gpu:1"),
        (TWO + TWO + LINK, "two devices are called"),
        (TWO.replace("like", "lik") + LINK, "Did you mean 'like'"),
        (TWO.replace("t4", "t5") + LINK, "Did you mean 't4'"),
        (TWO + "rates = { product = 0 }\n" + LINK, "above 0, got 0"),
        (TWO + "memory_bytes = -1\n" + LINK, "above 0, got -1"),
        (TWO + "threads = true\n" + LINK, "got True"),
        (TWO + LINK.replace("1e9", "-1"), "bytes_per_s: expected a number above 0"),
        (TWO + LINK.replace('"*"', '"gpu:9"', 1), "no device is called"),
        (TWO + LINK.replace('target = "*"', 'target = "/host:0/gpu:7"'), "link 1: target: no device is called"),
        (TWO + LINK.replace('"*"', '"/host:0/gpu:0"', 1), "no [[link]] leads from /host:0/gpu:1 to /host:0/gpu:0"),
        (TWO + LINK.replace("latency_s = 0", "latency_s = -1e-6"), "latency_s: expected a number of at least 0"),
        (TWO + LINK.replace("latency_s = 0", "latency_s = nan"), "latency_s: expected a number of at least 0, got nan"),
        (TWO + LINK.replace("1e9", "inf"), "bytes_per_s: expected a number above 0, got inf"),
        (TWO + LINK.replace("1e9", '"1e9"'), "bytes_per_s: expected a number above 0, got '1e9'"),
        (TWO + LINK.replace("bytes_per_s", "bandwidth"), "unknown key 'bandwidth'"),
        (TWO + LINK.replace("bytes_per_s = 1e9", ""), "bytes_per_s is missing"),
        (TWO + LINK + 'shared = "yes"\n', "shared: expected true or false, got 'yes'"),
        (TWO + LINK + "shared = true\nsender_copies = true\n", "there is no wire to share"),
        (TWO.replace("[[device]]", "[device]") + LINK, "device: expected entries that begin with [[device]]"),
        ("links = 3\n" + TWO + LINK, "the file: unknown key 'links'. Did you mean 'link'"),
        (TWO.replace("[0-1]", "[1-0]") + LINK, "expected a rising range"),
        (TWO.replace("/host:0/gpu:[0-1]", "gpu") + LINK, 'expected a name such as "/host:0/gpu:1"'),
        (TWO + 'kind = "tpu"\n' + LINK, "kind: expected"),
        (TWO + "count = 0\n" + LINK, "count: expected a whole number above 0, got 0"),
        (TWO + "dispatch_s = -1\n" + LINK, "dispatch_s: expected a number of at least 0, got -1"),
        ('[[device]]\nname = "/host:0/cpu:0"\nkind = "cpu"\nmemory_bytes = 1\n', "rates.product is missing"),
    ],
)
def test_a_mistake_is_refused(content: str, said: str) -> None:
    with pytest.raises(PlacementError) as caught:
        parse_cluster(content, "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert said in str(caught.value)
