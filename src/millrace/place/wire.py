"""What a user says about bytes on the wire: which tensors travel narrowed, and how.

    bfloat16    half of float32: 8 bits of precision, float32's range
    int8        a quarter: blocks of 256 elements, each with a scale
    zeros       exact: a bit for every element, and those elements that are not zero

A tensor is narrowed only on its way from one device to another. Activations and gradients may be. What lasts from step
to step may not, since its error would last as well: new values of variables, and what an update computes, travel as
they are. So does a variable's value that is read elsewhere, unless the variable is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch.fx import Node

from millrace.errors import SettingError, did_you_mean
from millrace.graph.graph import Graph, info, spec_of
from millrace.graph.signature import Phase, TensorSpec
from millrace.place.paths import inside, path_of

CODECS = ("bfloat16", "int8", "zeros")
INT8_BLOCK = 256  # elements that share a scale of four bytes
# For a smaller tensor, what a message costs anyway counts, not its bytes; see docs/decisions/0018-bytes-on-the-wire.md.
LEAST_BYTES = 16_384


@dataclass(frozen=True)
class Wire:
    """Which tensors are narrowed. patterns: of module paths, tensor names or exact names of variables -> codec; the
    first that fits counts. A pattern of modules also means what is inside them.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, wire: Wire | Mapping[str, str] | str | None) -> Wire:
        """From what users write: one codec for all, or a mapping. Raises: SettingError for an unknown codec."""
        if isinstance(wire, Wire):
            return wire
        if not isinstance(wire, str | Mapping | None):
            raise SettingError(
                f"wire={wire!r}: expected one of {', '.join(CODECS)}, or a mapping from modules to one of them"
            )
        patterns = {} if wire is None else {"*": wire} if isinstance(wire, str) else dict(wire)
        for pattern, codec in patterns.items():
            if codec not in CODECS:
                raise SettingError(
                    f"wire={wire!r}: {codec!r} (for {pattern!r}) is no way to narrow a tensor. Expected one of "
                    f"{', '.join(CODECS)}. {did_you_mean(str(codec), list(CODECS))}"
                )
        return cls(patterns)

    def codecs(self, graph: Graph) -> dict[str, str]:
        """Name of a node -> codec, for all that would be narrowed if they went to another device."""
        if not self.patterns:
            return {}
        found = {node.name: self._codec_of(node) for node in _activations_and_gradients(graph)}
        inputs = graph.placeholders()
        found |= {inputs[v.name].name: self.patterns.get(v.name) for v in graph.variables}
        for name in graph.updates.values():  # also where a variable takes over another one
            found.pop(name, None)
        specs = {node.name: spec_of(node) for node in graph.fx.nodes}
        return {name: codec for name, codec in found.items() if codec and can_narrow(codec, specs[name])}

    def check(self, graph: Graph) -> None:
        """Refuse patterns that fit nothing of the graph: they are misspelt. Raises: SettingError."""
        nodes = list(_activations_and_gradients(graph))
        variables = {v.name for v in graph.variables}
        for pattern in self.patterns:
            if pattern not in variables and not any(_fits(node, pattern) for node in nodes):
                paths = sorted({path_of(node) for node in nodes} - {""})
                raise SettingError(
                    f"wire: {pattern!r} fits no module, no tensor and no variable of the graph. "
                    + did_you_mean(pattern, [*paths, *variables])
                )

    def _codec_of(self, node: Node) -> str | None:
        return next((codec for pattern, codec in self.patterns.items() if _fits(node, pattern)), None)


def can_narrow(codec: str, spec: TensorSpec | None) -> bool:
    """Whether a tensor is of a kind and size for which the codec is meant."""
    if spec is None or not spec.dtype.is_floating_point or spec.size_bytes < LEAST_BYTES:
        return False
    return spec.dtype.itemsize > {"bfloat16": 2, "int8": 1, "zeros": 1}[codec]


def expected_bytes(codec: str | None, spec: TensorSpec) -> int:
    """Bytes that a tensor takes on the wire; for "zeros", which depends on the values, the most that it can."""
    elements = spec.size_bytes // spec.dtype.itemsize
    if codec == "bfloat16":
        return 2 * elements
    return elements + 4 * -(-elements // INT8_BLOCK) if codec == "int8" else spec.size_bytes


def _activations_and_gradients(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if info(node).phase is not Phase.UPDATE)


def _fits(node: Node, pattern: str) -> bool:
    return inside(path_of(node), pattern) or fnmatchcase(node.name, pattern)
