"""Null steps with TensorFlow's `ParameterServerStrategy`. `bench.null_step` starts it; needs tensorflow alone.

A process for each parameter server and each worker, and this one, which schedules a step at a time on whichever worker
is free, as the strategy does. A step reads every variable (or rows of it) on the worker, and subtracts zeros.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf

from bench.peers.null_common import ROW_WIDTH, answer


def be_server(task: dict[str, Any]) -> None:
    """A parameter server or a worker."""
    server = tf.distribute.Server(
        tf.train.ClusterSpec(task["cluster"]), job_name=task["role"], task_index=task["number"], protocol="grpc"
    )
    print(json.dumps({"ready": True}), flush=True)
    server.join()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(task: dict[str, Any], cluster: dict[str, list[str]]) -> list[subprocess.Popen[str]]:
    """All servers, ready."""
    children = []
    for role in ("ps", "worker"):  # the chief is this process
        for number in range(len(cluster[role])):
            full = json.dumps({**task, "role": role, "number": number, "cluster": cluster})
            command = [sys.executable, "-m", "bench.peers.null_tensorflow", full]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    return children


def make_step(task: dict[str, Any], strategy: tf.distribute.Strategy) -> Any:
    """The function that a worker runs."""
    count = max(1, task["size_bytes"] // task["shards"] // 4)
    shape = (count // ROW_WIDTH, ROW_WIDTH) if task["case"] == "rows" else (count,)
    with strategy.scope():
        variables = [tf.Variable(tf.zeros(shape)) for _ in range(task["shards"])]  # on the servers in turn
    each = task["rows"] // task["shards"]

    @tf.function
    def dense() -> tf.Tensor:
        # Something of every value is returned, so that all of it has to come to the worker.
        first = tf.add_n([tf.reshape(v.read_value(), [-1])[0] for v in variables])
        with tf.control_dependencies([first]):
            for v in variables:
                v.assign_sub(tf.zeros(shape))
        return first

    @tf.function
    def rows() -> tf.Tensor:
        wanted = [tf.random.uniform((each,), 0, shape[0], tf.int64) for _ in variables]
        found = [tf.gather(v, index) for v, index in zip(variables, wanted, strict=True)]
        first = tf.add_n([value[0, 0] for value in found])
        with tf.control_dependencies([first]):
            for v, index in zip(variables, wanted, strict=True):
                v.scatter_sub(tf.IndexedSlices(tf.zeros((each, ROW_WIDTH)), index))
        return first

    return (rows if task["case"] == "rows" else dense), variables


def main() -> None:
    task = json.loads(sys.argv[1])
    if "role" in task:
        be_server(task)
        return
    ports = free_ports(task["shards"] + task["workers"] + 1)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    cluster = {"ps": addresses[: task["shards"]], "worker": addresses[task["shards"] : -1], "chief": addresses[-1:]}
    start_s = time.perf_counter()
    children = start(task, cluster)
    try:
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(cluster), rpc_layer="grpc", task_type="chief", task_id=0
        )
        strategy = tf.distribute.ParameterServerStrategy(resolver)
        coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        step, variables = make_step(task, strategy)

        def run(steps: int) -> float:
            """The steps of all workers, over their number: as if each took its own."""
            began_s = time.perf_counter()
            for _ in range(steps * task["workers"]):
                coordinator.schedule(step)
            coordinator.join()
            return time.perf_counter() - began_s

        run(2)
        notes = {
            "start_s": round(time.perf_counter() - start_s, 2),
            "version": tf.__version__,
            "variables_on": [variable.device for variable in variables],
        }
        assert all(np.all(v.numpy()[:1] == 0) for v in variables)
        answer(run, notes)
    except BaseException:
        traceback.print_exc()
    finally:
        for child in children:
            child.kill()
            child.wait()
        os._exit(0)  # the coordinator's threads wait for servers that are gone


if __name__ == "__main__":
    main()
