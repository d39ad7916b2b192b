"""What a member can be: name -> what it does until it returns, and is a spare again."""

from __future__ import annotations

from collections.abc import Callable

from millrace.replicas.group_worker import group_worker
from millrace.replicas.line import Line
from millrace.replicas.server_worker import server_worker
from millrace.replicas.shard_role import shard
from millrace.replicas.worker import worker
from millrace.runtime.messages import Message

Role = Callable[[Line, Message], None]  # the message is the one that gave it the role

ROLES: dict[str, Role] = {
    "worker": worker,
    "shard": shard,
    "server_worker": server_worker,
    "group_worker": group_worker,
}
