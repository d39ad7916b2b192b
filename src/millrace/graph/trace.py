"""From a Python step function to a graph.

Two passes. The first runs the step once on fake tensors and records every ATen operator, autograd's included; what it
records still mutates (optimizers and BatchNorm do). The second functionalizes: mutations become new values, and a value
copied into a variable's placeholder at the end becomes that variable's update.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo  # make_fx imports it when first called; done here, the first step need not wait for it
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.errors import TraceError
from millrace.graph.graph import Graph
from millrace.graph.random import RandomStream, new_random
from millrace.graph.signature import Feed, Role, TensorSpec, Variable
from millrace.graph.tracing.alone import alone
from millrace.graph.tracing.device_scopes import in_these_scopes
from millrace.graph.tracing.finish import finish
from millrace.graph.tracing.functional import functionalize
from millrace.graph.tracing.recorder import LINE, Recorder
from millrace.graph.tracing.replace_calls import ReplacedCalls
from millrace.graph.tracing.trace_errors import at_the_call, explained, functionalizing, refuse_strays
from millrace.graph.tracing.variables import Holders

Step = Callable[[dict[str, Any], Any], Any]
RANDOM = "random"


def trace(step: Step, variables: Mapping[str, Any], feed: Any, *, seed: int = 0) -> Graph:
    """Trace one step into a graph.

    Args:
        step: called as `step(v, batch)`. `v` maps the names in `variables` to what stands for them: tensors may be
            read, updated in place or rebound (`v["W"] = v["W"] - g`); modules and optimizers are used as always. It
            may compute gradients in any way. What it returns (a tensor, or a nest of dicts and sequences of tensors)
            can be fetched by name.
        variables: name -> tensor, `nn.Module` or `torch.optim.Optimizer`. The graph's variables are the tensors
            inside (see `Holders`), plus "random" when the step draws random numbers.
        feed: an example batch: a tensor or a nest of tuples, lists and dicts of tensors. Only shapes, dtypes and
            devices are used.
        seed: seeds the variable "random".

    Returns: the graph; its `initial` values are the caller's own tensors, which a session then updates in place.

    Raises: TraceError naming the user's line when the step cannot be one graph.
    """
    with at_the_call():
        holders = Holders(variables)
        leaves, tree = flatten_feed(feed)
    device = _device(holders, leaves)
    random = new_random(seed).to(device)
    slots = dict(holders.slots)
    names = [*slots, RANDOM]
    if RANDOM in slots:
        raise TraceError('"random" is the name of the step\'s own random stream; call your variable something else')
    values = [slot.tensor for slot in slots.values()] + [random]
    fetch_names: list[str] = []

    def flat_step(*flat: Tensor) -> list[Tensor]:
        own, fed = flat[: len(names)], flat[len(names) :]
        leaves_of = {name: _leaf(tensor, slots[name].tensor) for name, tensor in zip(slots, own, strict=False)}
        stream = RandomStream(own[-1])
        recorder = Recorder(holders, stream)
        batch = pytree.tree_unflatten(list(fed), tree)
        with holders.standing_in(leaves_of) as view, explained(recorder, step):
            with recorder.recording(), ReplacedCalls():
                result = step(view, batch)
                fetched = flatten_fetches(result)
            changed = holders.current(view)
            with torch.no_grad():
                for name, now in changed.items():
                    if now is not leaves_of[name]:
                        _check_update(name, now, leaves_of[name])
                        leaves_of[name].copy_(now)
                if stream.used:
                    own[-1].add_(torch.arange(2, device=own[-1].device))  # the seed stays, the counter grows
        fetch_names[:] = fetched
        return [tensor.detach() for tensor in fetched.values()]

    with alone, _tracing():
        tracer = make_fx(flat_step, tracing_mode="fake", _allow_non_fake_inputs=True)
        recorded = tracer(*values, *_apart(leaves.values()))
        refuse_strays(recorded, step)
        with functionalizing(recorded):
            functional = functionalize(recorded)
    return finish(
        functional,
        variables=[slot.variable for slot in slots.values()]
        + [Variable(RANDOM, TensorSpec.of(random), Role.RANDOM, RANDOM)],
        feeds=[Feed(name, TensorSpec.of(tensor)) for name, tensor in leaves.items()],
        fetches=fetch_names,
        feed_tree=pytree.treespec_dumps(tree),
        initial=dict(zip(names, values, strict=True)),
        retrace=in_these_scopes(lambda other: trace(step, variables, other, seed=seed)),
    )


def _leaf(traced: Tensor, own: Tensor) -> Tensor:
    """What stands for a variable in the step: as differentiable as the caller's own tensor, and with its hooks."""
    leaf = traced.detach().requires_grad_(own.requires_grad)
    for hook in (own._backward_hooks or {}).values():
        leaf.register_hook(hook)
    for hook in (getattr(own, "_post_accumulate_grad_hooks", None) or {}).values():
        leaf.register_post_accumulate_grad_hook(hook)
    return leaf


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """The state of torch in which a step is traced; restored on leaving."""
    compiling, collecting = torch.compiler._is_compiling_flag, gc.isenabled()
    # Optimizers and models ask this flag whether Python may look at values.
    torch.compiler._is_compiling_flag = True
    gc.disable()  # what a trace makes lives until its end; looking through it again took an eighth of the time
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            with (
                fx_traceback.preserve_node_meta(),
                _use_lazy_graph_module(True),  # nobody calls what is recorded
                # What the user has compiled by torch.compile is traced as it was written.
                torch.compiler.set_stance("force_eager"),
                # Operators of these libraries hide state (cuDNN's batch norm) or workspaces (oneDNN's LSTM).
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
            ):
                yield
    finally:
        torch.compiler._is_compiling_flag = compiling
        if collecting:
            gc.enable()


def _apart(leaves: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of a batch, each its own: a tensor that stands in two places is two feeds, which may differ later."""
    seen: set[int] = set()
    for leaf in leaves:
        if id(leaf) in seen:
            leaf = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        seen.add(id(leaf))
        yield leaf


def flatten_feed(feed: Any) -> tuple[dict[str, Tensor], Any]:
    """A batch as named tensors and the spec of how they nest.

    Names are the path inside the batch, "images" or "0" or "inputs.mask"; a bare tensor is called "batch".
    """
    paths, tree = pytree.tree_flatten_with_path(feed)
    named: dict[str, Tensor] = {}
    for path, leaf in paths:
        name = ".".join(_key(k) for k in path) or "batch"
        if not isinstance(leaf, Tensor):
            raise TraceError(
                f"batch entry {name!r}: expected a tensor, got {type(leaf).__name__} ({leaf!r:.60}). "
                "Turn numbers and arrays into tensors, and leave out what the step does not compute with."
            )
        named[name] = leaf
    return named, tree


def flatten_fetches(result: Any) -> dict[str, Tensor]:
    """What a step returns, by fetch name; a bare tensor is called "result"."""
    found: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        name = ".".join(_key(k) for k in path) or "result"
        if leaf is None:
            continue
        if isinstance(leaf, int | float):
            leaf = torch.tensor(leaf)
        if not isinstance(leaf, Tensor):
            raise TraceError(
                f"the step returns {type(leaf).__name__} under {name!r}: expected tensors to fetch, or nests of them"
            )
        found[name] = leaf
    return found


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))


def _check_update(name: str, new: Any, old: Tensor) -> None:
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        expected, got = TensorSpec.of(old), TensorSpec.of(new) if isinstance(new, Tensor) else type(new).__name__
        line = getattr(new, LINE, "")
        raise TraceError(
            f"{line}{': ' if line else ''}variable {name!r} is {expected}, but the step gives it {got}. "
            "A variable keeps its shape and dtype."
        )


def _device(holders: Holders, leaves: Mapping[str, Tensor]) -> torch.device:
    for slot in holders.slots.values():
        return slot.tensor.device
    for leaf in leaves.values():
        return leaf.device
    return torch.device("cpu")
