"""What model code says by `with millrace.device` and `with millrace.colocate`: recorded, kept by passes, honoured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.partition.test_cut import invariants, same
from tests.place.test_placement import cluster, halved, placed
from torch import Tensor, nn

import millrace
from millrace.errors import PlacementError, SettingError
from millrace.graph.graph import Graph, info
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.split import split
from millrace.graph.save import graph_digest, load_graph, save_graph
from millrace.graph.signature import Phase
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.placed import pieces_of
from millrace.place.hints import Hints
from millrace.place.placement import Placement, follow

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers and a head; what is said between them is the test's."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def step(forward: Forward, loss: Callable[..., Any] | None = None) -> Graph:
    torch.manual_seed(0)
    model = Net(forward).double()
    batch = (torch.randn(8, 8).double(), torch.randint(0, 4, (8,)))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    return training_graph(model, loss or (lambda m, b: F.cross_entropy(m(b[0]), b[1])), adam, batch)


def trained(graph: Graph) -> Graph:
    return prune(graph, ["loss"], graph.updates)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.head(net.two(net.one(x).relu()))


def hinted(net: Net, x: Tensor) -> Tensor:
    with millrace.device("gpu:0"):
        x = net.one(x).relu()
        with millrace.device("cpu:1"):
            x = net.two(x)
        with millrace.device(None):
            x = x.tanh()
        x = x.exp()
    return net.head(x)


def line(function: Callable[..., Any], text: str) -> str:
    """ "file.py:12 in name" of the line of a function that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    at = first + next(i for i, content in enumerate(lines) if text in content)
    return f"{Path(__file__).name}:{at} in {function.__name__}"


def devices(graph: Graph) -> dict[str, str]:
    """Operator of a forward or backward node -> what is said of its device."""
    return {
        str(n.target).split(".")[-2]: info(n).device.name if info(n).device else "-"
        for n in graph.nodes
        if info(n).phase is not Phase.UPDATE and info(n).scope == "" and str(n.target).startswith("aten.")
    }


def where(placement: Placement) -> dict[str, str]:
    """Node -> the end of its device's name."""
    return {n.name: device.split("/")[-1] for task, device in placement.ordered_tasks() for n in task.nodes}


# -- recorded ---------------------------------------------------------------------------------------------------------


def test_the_inner_scope_wins_and_none_lifts_it() -> None:
    found = devices(step(hinted))
    assert (found["relu"], found["tanh"], found["exp"]) == ("gpu:0", "", "gpu:0")
    assert (found["threshold_backward"], found["tanh_backward"]) == ("gpu:0", "")
    of_modules = {info(n).scope: info(n).device for n in step(hinted).nodes if info(n).scope}
    assert {name: wish and wish.name for name, wish in of_modules.items()} == {
        "one": "gpu:0",
        "two": "cpu:1",
        "head": None,
    }
    assert line(hinted, 'device("cpu:1")') in of_modules["two"].line


@pytest.mark.parametrize("how", ["pruned", "saved", "microbatched", "split", "retraced"])
def test_what_is_said_survives_passes_and_files(how: str, tmp_path: Path) -> None:
    graph = step(hinted)
    before = {(info(n).scope, info(n).phase): info(n).device for n in graph.nodes if info(n).scope}
    if how == "pruned":
        graph = prune(graph, ["loss"], graph.updates)
    elif how == "saved":
        save_graph(graph, tmp_path / "step.graph")
        graph = load_graph(tmp_path / "step.graph")
    elif how == "microbatched":
        graph = microbatch(trained(graph), 4)
    elif how == "split":
        graph = split(graph, 2, min_width=4)
        assert any(info(n).block is not None and info(n).device for n in graph.nodes)
    else:
        assert graph.retrace is not None
        graph = graph.retrace((torch.randn(3, 8).double(), torch.zeros(3, dtype=torch.int64)))
    after = {(info(n).scope, info(n).phase): info(n).device for n in graph.nodes if info(n).scope}
    assert after == before
    assert "| on cpu:1" in str(graph)


def test_a_scope_around_the_trace_also_holds_when_the_step_is_traced_again() -> None:
    with millrace.device("cpu:1"):
        graph = step(plain)
    assert graph.retrace is not None
    for each in (graph, graph.retrace((torch.randn(3, 8).double(), torch.zeros(3, dtype=torch.int64)))):
        assert {info(n).device.name if info(n).device else "-" for n in each.nodes if info(n).scope} == {"cpu:1"}
    assert not any(info(n).device for n in step(plain).nodes)


def test_a_recomputed_module_keeps_its_device() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.device("cpu:1"):
            x = torch.utils.checkpoint.checkpoint(lambda x: net.two(net.one(x)).tanh(), x, use_reentrant=False)
        return net.head(x)

    inside = [n for n in step(forward).nodes if info(n).scope in ("one", "two")]
    assert {info(n).phase for n in inside} >= {Phase.FORWARD, Phase.BACKWARD}
    assert {info(n).device and info(n).device.name for n in inside} == {"cpu:1"}


def test_the_body_of_a_loop_goes_where_the_loop_is() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            with millrace.device("gpu:7"):
                carry = net.one(row) + carry
            return carry, carry

        with millrace.device("cpu:1"):
            last, _ = millrace.scan(body, torch.zeros(16).double(), x)
        return net.head(last.expand(8, 16))

    graph = step(forward)
    scans = [n for n in graph.nodes if str(n.target) == "scan"]
    assert {info(n).device and info(n).device.name for n in scans} == {"cpu:1"}


def test_a_graph_computes_the_same_with_and_without(in_tmp: Path) -> None:
    del in_tmp
    assert graph_digest(step(hinted)) != graph_digest(step(plain))  # its forward has tanh and exp
    assert graph_digest(step(lambda net, x: under(plain, net, x))) == graph_digest(step(plain))
    ends = []
    for forward in (plain, lambda net, x: under(plain, net, x)):
        torch.manual_seed(0)
        model, data = Net(forward), [(torch.randn(8, 8), torch.randint(0, 4, (8,))) for _ in range(3)]
        millrace.fit(
            model,
            data,
            loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            epochs=1,
            compile="eager",
            progress=False,
            run_dir=False,
        )
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def under(forward: Forward, net: Net, x: Tensor) -> Tensor:
    with millrace.device("gpu:3"), millrace.colocate("all"):
        return forward(net, x)


def test_plain_pytorch_and_torch_compile_do_not_notice() -> None:
    net, x = Net(lambda net, x: under(plain, net, x)), torch.randn(3, 8)
    assert torch.equal(net(x), plain(net, x))
    net(x).sum().backward()
    assert net.one.weight.grad is not None
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain(net, x))


@pytest.mark.parametrize("name", ["", "  ", 3, torch.device("cpu")])
@pytest.mark.parametrize("scope", [millrace.device, millrace.colocate])
def test_a_name_is_text(scope: Callable[[Any], Any], name: Any) -> None:
    with pytest.raises(SettingError, match="expected"):
        scope(name)


def test_an_error_inside_closes_the_scope() -> None:
    with pytest.raises(ZeroDivisionError), millrace.device("gpu:0"):
        raise ZeroDivisionError
    assert not any(info(n).device for n in step(plain).nodes)


# -- honoured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_placement_does_as_the_code_says(count: int) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.device("cpu:2"):
            x = net.one(x).relu()
        with millrace.device("cpu:1"):
            x = net.two(x)
        return net.head(x)

    graph = microbatch(trained(step(forward)), count)
    placement = placed(graph, cluster(3, bytes_per_s=1e6))
    at = where(placement)
    said = {n.name: info(n).device.name for n in graph.nodes if info(n).device}
    assert said
    assert {name: at[name] for name in said} == said
    homes = {name: home.split("/")[-1] for name, home in placement.homes.items()}
    for variable in ("one.weight", "optimizer/one.bias/exp_avg"):  # with their updates
        assert homes[variable] == "cpu:2"
    assert homes["two.weight"] == homes["optimizer/two.weight/exp_avg_sq"] == "cpu:1"
    partition = cut(graph, pieces_of(placement), placement.homes)
    invariants(graph, partition)
    same(graph, partition)


def test_the_update_of_a_shared_weight_goes_with_its_first_use_that_says_where() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.two(net.one(x))
        with millrace.device("cpu:1"):
            x = F.linear(x, net.two.weight.t())
        with millrace.device("cpu:2"):
            x = F.linear(x, net.two.weight)
        return net.head(x)

    graph = trained(step(forward))
    assert placed(graph, cluster(3)).homes["two.weight"] == "/host:0/cpu:1"
    for hints in (Hints(variables={"two.weight": "cpu:0"}), Hints(modules={"two": "cpu:0"})):
        assert placed(graph, cluster(3), hints).homes["two.weight"] == "/host:0/cpu:0"
    together = placed(graph, cluster(3), Hints(modules={"head": "cpu:0"}, together=[("two.weight", "head")]))
    assert together.homes["two.weight"] == "/host:0/cpu:0"


def test_an_update_may_say_itself_where_it_is() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 4, requires_grad=True)

    def update(v: dict[str, Any], x: Tensor) -> Tensor:
        with millrace.device("cpu:1"):
            loss = (x @ v["w"]).square().mean()
        gradient = torch.autograd.grad(loss, v["w"])[0]
        with millrace.device("cpu:0"):
            v["w"] = v["w"] - 0.1 * gradient
        return loss

    placement = placed(millrace.trace(update, {"w": w}, torch.randn(2, 4)), cluster(2))
    assert placement.homes["w"] == "/host:0/cpu:0"
    assert where(placement)["mm"] == "cpu:1"


def test_a_kind_leaves_the_choice_and_another_graph_of_the_step_follows() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.device("cpu"):
            return net.head(net.two(net.one(x)))

    graph = step(forward, lambda m, b: (F.cross_entropy(m(b[0]), b[1]), {"halved": halved(m.two(m.one(b[0])))}))
    placement = placed(trained(graph), cluster(1, 2))
    assert {placement.homes[f"{name}.weight"] for name in ("one", "two", "head")} == {"/host:0/cpu:0"}
    free = placed(trained(step(plain, lambda m, b: F.cross_entropy(m(b[0]), b[1]))), cluster(1, 2), {"*": "gpu"})
    again = step(plain, lambda m, b: (F.cross_entropy(m(b[0]), b[1]), {"halved": halved(m.two(m.one(b[0])))}))
    followed = follow(free, prune(again, ["halved"], ()))
    assert where(followed)["halved"] == "cpu:0", "only there it has a kernel"


def test_what_is_colocated_is_on_one_device() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.colocate("ends"):
            x = net.one(x)
        x = net.two(x)
        with millrace.colocate("ends"):
            return net.head(x)

    graph = trained(step(forward))
    homes = placed(graph, cluster(2), Hints(modules={"two": "cpu:1", "head": "cpu:0"})).homes
    assert homes["one.weight"] == homes["head.weight"] == "/host:0/cpu:0"
    both = Hints(modules={"head": "cpu:1"}, together=[("one", "two")])  # and so all three
    homes = placed(graph, cluster(2), both).homes
    assert {homes[f"{name}.weight"] for name in ("one", "two", "head")} == {"/host:0/cpu:1"}


def test_a_variable_can_go_with_a_module() -> None:
    graph = trained(step(plain))
    placement = placed(
        graph, cluster(2), Hints(modules={"one": "cpu:0", "head": "cpu:1"}, together=[("two.w*", "one")])
    )
    assert placement.homes["two.weight"] == "/host:0/cpu:0"
    same(graph, cut(graph, pieces_of(placement), placement.homes))


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_device_that_the_cluster_has_not_is_refused_with_the_line() -> None:
    with pytest.raises(PlacementError) as caught:
        placed(trained(step(hinted)), cluster(2))
    said = line(hinted, 'device("gpu:0")')
    assert f"{said} says `with device('gpu:0')`" in str(caught.value)
    assert "the cluster has no device 'gpu:0'" in str(caught.value)

    def anywhere(net: Net, x: Tensor) -> Tensor:
        with millrace.device("gpu"):
            return plain(net, x)

    with pytest.raises(PlacementError, match=r"`with device\('gpu'\)`\. This asks for a gpu, but the cluster has none"):
        placed(trained(step(anywhere)), cluster(2))


def test_contradictions_are_refused_with_the_chain_of_reasons() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.device("cpu:0"), millrace.colocate("same"):
            x = net.one(x)
        with millrace.device("cpu:1"), millrace.colocate("same"):
            return net.head(net.two(x))

    graph = trained(step(forward))
    with pytest.raises(PlacementError) as caught:
        placed(graph, cluster(2))
    first, second = line(forward, 'device("cpu:0")'), line(forward, 'device("cpu:1")')
    for reason in (
        f"{first} says `with device('cpu:0')`",
        f"{second} says `with device('cpu:1')`",
        f"{first} says `with colocate('same')`",
        f"{second} says `with colocate('same')`",
    ):
        assert reason in str(caught.value)
    with pytest.raises(PlacementError, match=r"(?s)'one' matches 'one'.* on cpu:1; .*says `with device\('cpu:0'\)`"):
        placed(graph, cluster(2), {"one": "cpu:1"})


def test_an_operator_without_a_kernel_for_the_device_is_refused_with_both_reasons() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.two(net.one(x))
        with millrace.device("gpu"):
            x = halved(x)
        return net.head(x)

    with pytest.raises(PlacementError) as caught:
        placed(trained(step(forward)), cluster(1, 1))
    said = line(forward, 'device("gpu")')
    assert f"{said} says `with device('gpu')`" in str(caught.value)
    assert f"{line(forward, 'halved(x)')}) has a kernel only for cpu" in str(caught.value)

    def beside(net: Net, x: Tensor) -> Tensor:
        with millrace.device("gpu"):
            x = net.two(net.one(x))
        return net.head(halved(x))

    placement = placed(trained(step(beside)), cluster(1, 1))
    assert where(placement)["halved"] == "cpu:0", "it stands outside, so it need not follow"
    assert placement.homes["two.weight"] == "/host:0/gpu:0"


def test_blocks_of_a_layer_that_is_said_to_be_in_one_place_are_not_put_apart() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with millrace.device("cpu:0"):
            x = net.one(x)
        return net.head(net.two(x))

    graph = split(trained(step(forward)), 2, min_width=4)
    with pytest.raises(PlacementError, match=r"(?s)'one.block 1'.*'one.block 1'.* on cpu:1; .*with device\('cpu:0'\)"):
        placed(graph, cluster(2), {"one.block 1": "cpu:1"})
    assert placed(graph, cluster(2), {"two.block 1": "cpu:1"}).homes["two.weight[8:16]"] == "/host:0/cpu:1"
