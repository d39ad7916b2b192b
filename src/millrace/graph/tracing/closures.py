"""Bodies of loops and branches without closures: what a body uses from outside becomes an operand.

torch.cond, scan, map and while_loop differentiate with respect to their operands alone; a parameter that a body merely
closes over would get no gradient, without a word. So, while a step is traced, every body is run once to see which
tensors it reaches outside of its arguments, and those are passed in as further operands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch._higher_order_ops.partitioner
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.errors import TraceError
from millrace.graph.random import REPLACEMENTS
from millrace.graph.tracing.refusals import WHILE_WITH_GRADIENT, tensors_in, written_by

Body = Callable[..., Any]

# torch 2.11 leaves this logger at DEBUG, so that every scan with a gradient prints pages.
logging.getLogger(torch._higher_order_ops.partitioner.__name__).setLevel(logging.INFO)


def call_without_closures(operator: HigherOrderOperator, arguments: Sequence[Any]) -> Any:
    """Call a control-flow operator with the closures of its bodies as operands; any other operator as it is.

    What the bodies take and return may be nested; the operators themselves know flat lists alone.

    Raises: TraceError when a body changes a tensor from outside in place, or reaches one in a way that cannot be
    replaced and that needs a gradient.
    """
    name = operator.name()
    if not any(_is_body(argument) for argument in arguments):
        return operator(*arguments)
    if name == "cond":
        predicate, yes, no, operands = arguments
        flat, nest = pytree.tree_flatten(tuple(operands))
        lifted = _Lifting(name, [_nested(yes, nest), _nested(no, nest)], flat)
        if lifted.nests[0] != lifted.nests[1]:
            raise TraceError(f"the branches of cond return different structures: {lifted.nests[0]}, {lifted.nests[1]}")
        result = operator(predicate, *lifted.bodies, (*flat, *lifted.extra))
    elif name == "scan":
        body, init, xs, constants = arguments
        lifted = _Lifting(name, [body], [*init, *_first(xs), *constants])
        constants = (*constants, *lifted.extra)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in((init, xs, constants))):
            init = [_differentiable(t) for t in init]
        result = operator(*lifted.bodies, init, xs, constants)
    elif name == "map_impl":
        body, xs, constants = arguments
        lifted = _Lifting(name, [body], [*_first(xs), *constants])
        result = operator(*lifted.bodies, xs, [*constants, *lifted.extra])
    elif name == "while_loop":
        test, body, carried, constants = arguments
        lifted = _Lifting(name, [test, body], [*carried, *constants])
        constants = (*constants, *lifted.extra)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in((carried, constants))):
            raise TraceError(WHILE_WITH_GRADIENT)
        test, body = lifted.bodies
        test.first_only = True
        result = operator(test, body, carried, constants)
    else:
        return operator(*arguments)
    return pytree.tree_unflatten(list(result), lifted.nests[-1])


def bodies_within(mode: TorchFunctionMode, arguments: Sequence[Any]) -> list[Any]:
    """`arguments` with their bodies running inside `mode`, which is switched off while it handles their operator."""
    return [_within(mode, argument) if _is_body(argument) else argument for argument in arguments]


def _within(mode: TorchFunctionMode, body: Body) -> Body:
    def run(*arguments: Any) -> Any:
        with mode:
            return body(*arguments)

    return run


def _is_body(argument: Any) -> bool:
    """Graph modules are bodies of torch's own making, backward ones for example; they have no closures."""
    return callable(argument) and not isinstance(argument, Tensor | GraphModule)


def _first(xs: Sequence[Tensor]) -> list[Tensor]:
    with disable_proxy_modes_tracing():
        return [x.select(0, 0) for x in xs]


def _differentiable(start: Tensor) -> Tensor:
    """A carry's start that requires a gradient: without, torch 2.11 cuts the gradient through the whole carry."""
    floating = start.is_floating_point() or start.is_complex()
    return start.detach().requires_grad_() if floating and not start.requires_grad else start


def _nested(body: Body, nest: Any) -> Body:
    return lambda *flat: body(*pytree.tree_unflatten(list(flat), nest))


class _Lifting:
    """Bodies that take what they reach outside (`extra`) as their last arguments and return tuples of tensors.

    `nests`: how what each of them returned was nested.
    """

    def __init__(self, name: str, bodies: Sequence[Body], inputs: list[Any]) -> None:
        outside: dict[int, Tensor] = {}
        self.nests = []
        for body in bodies:
            watch = _watched(name, body, inputs)
            outside.update(watch.reached)
            self.nests.append(watch.nest)
        self.extra = list(outside.values())
        self.bodies = [_Lifted(body, self.extra) for body in bodies]
        # Tried with other tensors in the place of those outside, to see that none of them is reached any more.
        with disable_proxy_modes_tracing():
            others = [tensor.detach() for tensor in self.extra]
        for lifted in self.bodies:
            for tensor in _watched(name, lifted, [*inputs, *others]).reached.values():
                if tensor.requires_grad:
                    raise TraceError(
                        f"the body of {name} reaches a tensor of shape {list(tensor.shape)} outside of it in a way "
                        "that cannot be followed (inside an autograd.Function?), and that tensor needs a gradient. "
                        "Pass it to the body as an argument: as an operand of cond, a constant of scan or map_."
                    )


def _watched(name: str, body: Body, inputs: Sequence[Any]) -> _Watch:
    """Run `body` without leaving a trace, to see which tensors it uses that are neither inputs nor made inside."""
    watch = _Watch(name, inputs)
    with disable_proxy_modes_tracing(), torch.no_grad(), watch:
        watch.nest = pytree.tree_structure(body(*inputs))
    return watch


class _Watch(TorchDispatchMode):
    """Sees every operator of a body and notes which of its arguments come from outside."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __init__(self, name: str, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.name = name
        self.reached: dict[int, Tensor] = {}
        self.nest: Any = None
        # Kept alive, so that no identity is used twice.
        self._known: dict[int, Tensor] = {id(t): t for t in tensors_in(inputs)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in REPLACEMENTS:
            raise TraceError(
                f"a random operator ({func}) stands inside the body of {self.name}, where the step's random stream "
                "cannot be read. Draw outside the body and pass the numbers in."
            )
        if func is not torch.ops.aten.lift_fresh.default:  # its argument is a literal of the body
            for tensor in tensors_in((*args, *kwargs.values())):
                if id(tensor) not in self._known:
                    self.reached[id(tensor)] = tensor
        for tensor in written_by(func, args, kwargs):
            if id(tensor) in self.reached:
                raise TraceError(
                    f"the body of {self.name} changes a tensor from outside in place ({func}), for example a running "
                    "statistic of BatchNorm. Return the new value from the body and assign it outside."
                )
        result = func(*args, **kwargs)
        self._known.update({id(t): t for t in tensors_in((result,)) if id(t) not in self.reached})
        return result


class _Lifted:
    """A body that takes the tensors it reached outside as its last arguments.

    first_only: return the first of the results alone, as the test of while_loop must.
    """

    def __init__(self, body: Body, outside: Sequence[Tensor], first_only: bool = False) -> None:
        self.body = body
        self.outside = outside
        self.first_only = first_only

    def __call__(self, *arguments: Any) -> Any:
        _with_plain_gradients(arguments)
        split = len(arguments) - len(self.outside)
        standing_in = {id(old): new for old, new in zip(self.outside, arguments[split:], strict=True)}
        with _Substituted(standing_in):
            result = self.body(*arguments[:split])
        results = _on_its_own(result, list(tensors_in(arguments)))
        return results[0] if self.first_only else results


def _on_its_own(result: Any, inputs: list[Tensor]) -> tuple[Any, ...]:
    """`result` as flat, contiguous tensors, none of which shares memory with an input or an earlier one.

    The operators refuse shared memory, and branches whose results lie differently in memory.
    """
    seen = list(inputs)

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            shared = any(
                torch._C._is_alias_of(leaf, other)  # type: ignore[attr-defined]
                for other in seen
            )
            leaf = leaf.clone(memory_format=torch.contiguous_format) if shared else _plain(leaf)
            seen.append(leaf)
        return leaf

    return tuple(own(leaf) for leaf in pytree.tree_leaves(result))


def _plain(tensor: Tensor) -> Tensor:
    """`tensor`, or its copy when it is part of a larger one, or its elements lie in another order."""
    if tensor.storage_offset() == 0 and tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _with_plain_gradients(arguments: Sequence[Any]) -> None:
    """Make the gradients of a body's arguments plain: the backward pass of a branch is a branch that returns them."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad and torch.is_grad_enabled():
            argument.register_hook(_plain)


class _Substituted(TorchFunctionMode):
    """Gives other tensors to every call that uses certain tensors.

    In a loop within a loop, the inner one's operand stands in for what the outer one's stands in for.
    """

    _entered: ClassVar[list[_Substituted]] = []

    def __init__(self, standing_in: dict[int, Tensor]) -> None:
        super().__init__()
        outer: dict[int, Tensor] = self._entered[-1]._standing_in if self._entered else {}
        self._standing_in: dict[int, Tensor] = {
            old: standing_in.get(id(new), new) for old, new in outer.items()
        } | standing_in

    def __enter__(self) -> _Substituted:
        self._entered.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def replaced(leaf: Any) -> Any:
            return self._standing_in.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(replaced, (args, kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            args = tuple(bodies_within(self, args))
        return func(*args, **kwargs)
