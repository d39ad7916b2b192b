"""Clusters: names whole and short, kinds and hosts, rates by precision, and which link joins a pair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import PlacementError
from millrace.place.cluster import CLASSES, MEMORY, SPECIAL, Cluster, Device, Link

RATES = dict.fromkeys(CLASSES, 1000000000.0)


def device(name: str, **rates: float) -> Device:
    return Device(name, "cuda" if "gpu" in name else "cpu", 1 << 30, {**RATES, **rates})


TWO_HOSTS = Cluster(
    tuple(device(name) for name in ("/host:0/gpu:0", "/host:0/gpu:1", "/host:1/gpu:0", "/host:0/cpu:0")),
    (
        Link("/host:0/*", "/host:0/*", 1e-6, 1e10),
        Link("*", "/host:1/*", 1e-4, 1e9, shared=True),
    ),
)


def test_a_device_is_found_by_its_whole_name_or_by_an_end_that_says_which() -> None:
    assert TWO_HOSTS.device("/host:1/gpu:0").name == "/host:1/gpu:0"
    assert TWO_HOSTS.device("gpu:1").name == "/host:0/gpu:1"
    assert TWO_HOSTS.device("cpu:0").name == "/host:0/cpu:0"


def test_an_end_that_several_have_is_refused_with_all_of_them() -> None:
    with pytest.raises(PlacementError, match=r"'gpu:0' may be any of /host:0/gpu:0, /host:1/gpu:0: write the whole"):
        TWO_HOSTS.device("gpu:0")


@pytest.mark.parametrize("name", ["gpu:2", "pu:1", "0/gpu:1", "/gpu:1", "gpu", "", "/host:2/gpu:0", "GPU:1"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(PlacementError, match="the cluster has no device"):
        TWO_HOSTS.device(name)


def test_the_message_suggests_a_near_name() -> None:
    with pytest.raises(PlacementError, match="Did you mean '/host:0/gpu:1'"):
        TWO_HOSTS.device("/host:0/gpu1")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["cpu", "gpu"]), st.integers(0, 3)), unique=True, min_size=1)
)
def test_short_names_mean_one_device_or_none(parts: list[tuple[int, str, int]]) -> None:
    cluster = Cluster(tuple(device(f"/host:{host}/{kind}:{index}") for host, kind, index in parts))
    for host, kind, index in parts:
        whole, short = f"/host:{host}/{kind}:{index}", f"{kind}:{index}"
        assert cluster.device(whole).name == whole
        assert cluster.device(whole).host == f"/host:{host}"
        if sum((k, i) == (kind, index) for _, k, i in parts) == 1:
            assert cluster.device(short).name == whole
        else:
            with pytest.raises(PlacementError, match="write the whole name"):
                cluster.device(short)


def test_of_several_links_the_first_that_joins_a_pair_counts() -> None:
    assert TWO_HOSTS.link("/host:0/gpu:0", "/host:0/cpu:0").latency_s == 1e-6
    assert TWO_HOSTS.link("/host:0/gpu:0", "/host:1/gpu:0").shared
    general = Cluster(TWO_HOSTS.devices, (Link("*", "*", 1.0, 1.0), *TWO_HOSTS.links))
    assert general.link("/host:0/gpu:0", "/host:0/cpu:0").latency_s == 1.0


def test_links_lead_in_one_direction() -> None:
    with pytest.raises(PlacementError, match=r"no link leads from /host:1/gpu:0 to /host:0/gpu:0\. Add one"):
        TWO_HOSTS.link("/host:1/gpu:0", "/host:0/gpu:0")


def test_a_rate_may_be_given_for_one_precision() -> None:
    fast = device("/host:0/gpu:0", **{"product.bfloat16": 8e9, MEMORY: 5e8})
    assert fast.rate("product", "bfloat16") == 8e9
    assert fast.rate("product", "float32") == fast.rate("product", "float64") == 1e9
    assert fast.rate("convolution", "bfloat16") == 1e9


def test_special_operators_run_at_the_rate_of_memory_where_none_is_given() -> None:
    assert device("/host:0/gpu:0", **{MEMORY: 5e8}).rate(SPECIAL, "float32") == 5e8
    assert device("/host:0/gpu:0", **{MEMORY: 5e8, SPECIAL: 2e8}).rate(SPECIAL, "float32") == 2e8
    assert device("/host:0/gpu:0", **{f"{MEMORY}.float64": 3e8}).rate(SPECIAL, "float64") == 3e8
