"""A shard that counts updates, in a process of its own: `python -m tests.replicas.shard_process TASK`.

TASK is JSON: who, address, size, needed (0: asynchronous), workers, copy. It then follows lines of JSON: {"attach":
ADDRESS} makes the process there the holder of its copy, {"promote": true} makes this copy the shard. Answers "ok".
"""

from __future__ import annotations

import json
import sys
import threading

import torch
from tests.replicas.counting import TOKEN, attach_copy, counting_server

from millrace.replicas.shard_events import Async, Sync
from millrace.runtime import handshake


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    policy = Sync(task["needed"]) if task["needed"] else Async()
    workers = tuple(task["workers"])
    server = counting_server(task["who"], {"a": task["size"]}, policy, workers, is_copy=task["copy"])
    listener = handshake.listen(task["address"])
    threading.Thread(target=server.serve, args=(listener, TOKEN), daemon=True).start()
    print("ok", flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        if "attach" in said:
            attach_copy(server, said["attach"])
        else:
            server.promote()
        print("ok", flush=True)


if __name__ == "__main__":
    main()
