"""What a member is sent that is to hold a shard of the variables, or the copy of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from millrace.graph.passes.shards import Shard
from millrace.graph.save import graph_bytes
from millrace.graph.signature import TensorSpec
from millrace.replicas.programs import as_tensor
from millrace.replicas.regions import layout, to_json
from millrace.replicas.shard_events import Policy
from millrace.replicas.shard_log import policy_to_json
from millrace.replicas.worker import GRAPH, VARIABLE

_WRITES_S = 10.0  # that whoever a shard writes to may take nothing
_SLOWEST_BYTES_PER_S = 1e8


def shard_setup(
    part: Shard, variables: Mapping[str, Tensor], policy: Policy, *, copy: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of its role, and the tensors beside it. copy: it will be given the variables by the shard."""
    values = {name: variables[name] for name in part.variables}
    places, _ = layout({name: TensorSpec.of(value) for name, value in values.items()})
    writes_s = _WRITES_S + sum(value.nbytes for value in values.values()) / _SLOWEST_BYTES_PER_S
    fields = {"policy": policy_to_json(policy), "variables": to_json(places), "timeout_s": writes_s}
    tensors = {GRAPH: as_tensor(graph_bytes(part.graph))}
    return fields, tensors if copy else tensors | {VARIABLE + name: value for name, value in values.items()}
