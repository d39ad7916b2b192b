"""From a recording with mutations to one without.

Most steps mutate in simple ways: an optimizer overwrites whole variables, BatchNorm its statistics, autograd adds into
fresh tensors. Those are renamed here, node by node: after `x.add_(y)` every reader of `x` reads `add(x, y)`. Where
views of the same memory are mutated and read later, torch's functionalization runs the recording once more instead;
that is exact for everything, and takes as long as recording did.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.graph.graph import step_module
from millrace.graph.tracing.aliases import give_bodies_own_memory, is_view

aten = torch.ops.aten
_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_FOREVER = 1 << 60


def functionalize(recorded: GraphModule) -> GraphModule:
    """The same computation without mutation, ending in `copy_(placeholder, value)` for every changed placeholder."""
    return renamed(recorded) or rerun(recorded)


def rerun(recorded: GraphModule) -> GraphModule:
    """By torch's own functionalization, for any recording."""
    inputs = [node.meta["val"] for node in recorded.graph.nodes if node.op == "placeholder"]

    def interpret(*flat: Tensor) -> Any:
        return torch.fx.Interpreter(recorded).run(*flat, enable_io_processing=False)

    give_bodies_own_memory(recorded)
    # Inside the fake mode, so that nodes without inputs (zeros, arange) are fake as well.
    with detect_fake_mode(inputs) or contextlib.nullcontext():
        return make_fx(torch.func.functionalize(interpret, remove="mutations"), _allow_non_fake_inputs=True)(*inputs)


def renamed(recorded: GraphModule) -> GraphModule | None:
    """By renaming; None when some mutation is not as simple as that."""
    try:
        return _Renaming(recorded).result()
    except _NotSimpleError:
        return None


class _NotSimpleError(Exception):
    """A mutation that renaming cannot express."""


@dataclass(eq=False)
class _Cell:
    """One view of some memory: the value that it has now, and when it is last read."""

    memory: _Memory
    now: Any = None
    last_read: int = -1


@dataclass(eq=False)
class _Memory:
    cells: list[_Cell] = field(default_factory=list)
    is_input: bool = False


class _Renaming:
    def __init__(self, recorded: GraphModule) -> None:
        self._recorded = recorded
        self._nodes = list(recorded.graph.nodes)
        self._cell: dict[Node, _Cell] = {}
        for position, node in enumerate(self._nodes):
            self._cell[node] = cell = self._cell_of(node)
            if node.op == "placeholder":
                cell.last_read = _FOREVER  # what a variable holds outlives the step
            for argument in node.all_input_nodes:
                read = self._cell[argument]
                read.last_read = max(read.last_read, position)
        self._graph = torch.fx.Graph()
        self._inputs: dict[Node, Node] = {}

    def _cell_of(self, node: Node) -> _Cell:
        """Which view of which memory a node's result is."""
        if node.op == "call_function":
            source = self._cell.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
            if node.target in _SAME or (_mutates(node) and node.target is not _BATCH_NORM):
                if source is None:
                    raise _NotSimpleError
                return source
            if source is not None and is_view(node):
                return self._new_cell(source.memory)
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise _NotSimpleError
        return self._new_cell(_Memory(is_input=node.op in ("placeholder", "get_attr")))

    def _new_cell(self, memory: _Memory) -> _Cell:
        cell = _Cell(memory)
        memory.cells.append(cell)
        return cell

    def result(self) -> GraphModule:
        for position, node in enumerate(self._nodes):
            if node.op == "output":
                self._copy_into_placeholders()
                self._graph.node_copy(node, self._now)
            elif node.target is _BATCH_NORM:
                self._batch_norm(node, position)
            elif node.op == "call_function" and _mutates(node):
                self._rename(node, position)
            elif not (node.op == "call_function" and node.target in _SAME):
                self._cell[node].now = new = self._copy(node)
                if node.op == "placeholder":
                    self._inputs[node] = new
        return step_module(self._recorded, self._graph)

    def _now(self, node: Node) -> Node:
        return self._cell[node].now

    def _copy(self, node: Node) -> Node:
        new = self._graph.node_copy(node, self._now)
        new.meta = dict(node.meta)
        return new

    def _rename(self, node: Node, position: int) -> None:
        functional = _functional(node)
        cell = self._cell[node]
        self._require_alone(cell, position)
        new = self._copy(node)
        new.target = functional
        cell.now = new

    def _batch_norm(self, node: Node, position: int) -> None:
        """Training's batch norm overwrites its two running statistics, arguments 3 and 4."""
        statistics = [self._cell[argument] for argument in node.args[3:5]]  # type: ignore[index]
        for cell in statistics:
            self._require_alone(cell, position)
        new = self._copy(node)
        new.target = aten._native_batch_norm_legit_functional.default
        new.meta["val"] = (*node.meta["val"], *(cell.now.meta["val"] for cell in statistics))
        self._cell[node].now = new
        for index, cell in enumerate(statistics, start=3):
            item = self._graph.call_function(operator.getitem, (new, index))
            item.meta = {**new.meta, "val": new.meta["val"][index]}
            cell.now = item

    def _require_alone(self, cell: _Cell, position: int) -> None:
        """Nothing else that shares the memory may be read after it has changed."""
        if any(other is not cell and other.last_read > position for other in cell.memory.cells):
            raise _NotSimpleError

    def _copy_into_placeholders(self) -> None:
        for node, placeholder in self._inputs.items():
            if self._cell[node].now is not placeholder:
                self._graph.call_function(aten.copy_.default, (placeholder, self._cell[node].now))


_BATCH_NORM = aten._native_batch_norm_legit.default


def _mutates(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _functional(node: Node) -> OpOverload:
    """The operator that returns what `node` would have written. Raises _NotSimpleError when there is none."""
    target = node.target
    assert isinstance(target, OpOverload)
    schema = target._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    name = schema.name.split("::")[1]
    if len(written) != 1 or written[0].name != schema.arguments[0].name or not name.endswith("_"):
        raise _NotSimpleError
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    overload = target._overloadname
    if packet is None or overload not in packet.overloads() or not _keeps_dtype(node):
        raise _NotSimpleError
    functional: OpOverload = getattr(packet, overload)
    if functional._schema.is_mutable or functional.is_view:
        raise _NotSimpleError
    return functional


def _keeps_dtype(node: Node) -> bool:
    """Whether the operator, not in place, gives the dtype of its first argument; in place it casts to it."""
    if node.target is aten.copy_.default:
        return True
    own = node.args[0].meta["val"]  # type: ignore[union-attr]
    for argument in node.all_input_nodes[1:]:
        value = argument.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype == own.dtype:
            continue
        if not _rank(value.dtype) < _rank(own.dtype) and not (
            value.ndim == 0 and own.ndim > 0 and _rank(value.dtype) == _rank(own.dtype)
        ):
            return False
    return True


def _rank(dtype: torch.dtype) -> int:
    """Bool, integer, floating, complex: a lower kind never widens a higher one."""
    if dtype.is_complex:
        return 3
    return 2 if dtype.is_floating_point else 0 if dtype is torch.bool else 1
