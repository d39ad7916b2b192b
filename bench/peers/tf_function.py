"""The same models in plain TensorFlow under `tf.function`, updated by its own kernels. Needs tensorflow alone.

Images and kernels have channels last. The recurrent loop is unrolled, which is the quicker way in TensorFlow.
`bfloat16` casts the inputs of products and convolutions, as autocast does.
Options: `jit_compile`; `steps_per_call`, that many steps looped in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from bench.protocol import Peer, serve

Weights = dict[str, Any]


def dense(weights: Weights, name: str, x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """x @ W.T + b, with PyTorch's layout of W."""
    flat = tf.reshape(tf.cast(x, dtype), (-1, x.shape[-1]))
    product = tf.matmul(flat, tf.cast(weights[f"{name}.weight"], dtype), transpose_b=True)
    if f"{name}.bias" in weights:
        product = tf.nn.bias_add(product, tf.cast(weights[f"{name}.bias"], dtype))
    return tf.reshape(product, (*x.shape[:-1], product.shape[-1]))


def mlp(weights: Weights, x: tf.Tensor, sizes: dict[str, int], dtype: tf.DType) -> tf.Tensor:
    return dense(weights, "2", tf.nn.relu(dense(weights, "0", x, dtype)), dtype)


def cnn(weights: Weights, x_BHWC: tf.Tensor, sizes: dict[str, int], dtype: tf.DType) -> tf.Tensor:
    for name, pool in (("0", False), ("2", True), ("5", True)):
        kernel = tf.cast(weights[f"{name}.weight"], dtype)
        x_BHWC = tf.nn.conv2d(tf.cast(x_BHWC, dtype), kernel, 1, "SAME")
        x_BHWC = tf.nn.relu(tf.nn.bias_add(x_BHWC, tf.cast(weights[f"{name}.bias"], dtype)))
        if pool:
            x_BHWC = tf.nn.max_pool2d(x_BHWC, 2, 2, "VALID")
    return dense(weights, "9", tf.reshape(x_BHWC, (x_BHWC.shape[0], -1)), dtype)


def layer_norm(weights: Weights, name: str, x: tf.Tensor) -> tf.Tensor:
    x = tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(q_BHTD: tf.Tensor, k_BHTD: tf.Tensor, v_BHTD: tf.Tensor) -> tf.Tensor:
    tokens, width = q_BHTD.shape[2], q_BHTD.shape[3]
    scores = tf.cast(tf.matmul(q_BHTD, k_BHTD, transpose_b=True), tf.float32) * width**-0.5
    later = tf.constant(np.triu(np.full((tokens, tokens), -1e9, np.float32), 1))
    return tf.matmul(tf.cast(tf.nn.softmax(scores + later), v_BHTD.dtype), v_BHTD)


def transformer(weights: Weights, tokens_BT: tf.Tensor, sizes: dict[str, int], dtype: tf.DType) -> tf.Tensor:
    batch, tokens = tokens_BT.shape
    x = tf.gather(weights["token.weight"], tokens_BT) + weights["position.weight"][:tokens]
    for layer in range(sizes["layers"]):
        at = f"blocks.{layer}."
        qkv = dense(weights, at + "qkv", layer_norm(weights, at + "norm1", x), dtype)
        split = tf.reshape(qkv, (batch, tokens, 3, sizes["heads"], -1))
        mixed = attention(*tf.unstack(tf.transpose(split, (2, 0, 3, 1, 4))))
        mixed = tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), (batch, tokens, sizes["width"]))
        x = x + tf.cast(dense(weights, at + "out", mixed, dtype), tf.float32)
        up = tf.nn.gelu(dense(weights, at + "up", layer_norm(weights, at + "norm2", x), dtype), approximate=True)
        x = x + tf.cast(dense(weights, at + "down", up, dtype), tf.float32)
    return dense(weights, "head", layer_norm(weights, "norm", x), dtype)


def lstm(weights: Weights, tokens_TB: tf.Tensor, sizes: dict[str, int], dtype: tf.DType) -> tf.Tensor:
    x_TBD = tf.gather(weights["token.weight"], tokens_TB)
    for layer in range(sizes["layers"]):
        name = f"lstm.{{}}_{{}}_l{layer}"
        inputs = {"0.weight": weights[name.format("weight", "ih")]}
        bias = tf.cast(weights[name.format("bias", "ih")] + weights[name.format("bias", "hh")], dtype)
        gates_TBG = dense(inputs, "0", x_TBD, dtype) + bias
        recurrent = tf.cast(weights[name.format("weight", "hh")], dtype)
        hidden = memory = tf.zeros((tokens_TB.shape[1], sizes["width"]), dtype)
        outputs = []
        for gates_BG in tf.unstack(gates_TBG):
            i, f, g, o = tf.split(gates_BG + tf.matmul(hidden, recurrent, transpose_b=True), 4, axis=-1)
            memory = tf.sigmoid(f) * memory + tf.sigmoid(i) * tf.tanh(g)
            hidden = tf.sigmoid(o) * tf.tanh(memory)
            outputs.append(hidden)
        x_TBD = tf.stack(outputs)
    return dense(weights, "head", x_TBD, dtype)


FORWARD: dict[str, Callable[..., tf.Tensor]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "lstm": lstm,
}


def sgd(weights: Weights, gradients: Weights, rate: float) -> None:
    for name, weight in weights.items():
        tf.raw_ops.ResourceApplyGradientDescent(var=weight.handle, alpha=rate, delta=gradients[name])


class AdamW:
    """PyTorch's AdamW with its defaults, through TensorFlow's one-kernel Adam."""

    def __init__(self, weights: Weights) -> None:
        self.first = {name: tf.Variable(tf.zeros_like(w)) for name, w in weights.items()}
        self.second = {name: tf.Variable(tf.zeros_like(w)) for name, w in weights.items()}
        self.count = tf.Variable(0.0)

    def __call__(self, weights: Weights, gradients: Weights, rate: float) -> None:
        self.count.assign_add(1.0)
        power1, power2 = 0.9**self.count, 0.999**self.count
        for name, weight in weights.items():
            weight.assign(weight * (1 - rate * 0.01))
            # The kernel adds epsilon before it corrects the second moment; PyTorch after.
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=self.first[name].handle,
                v=self.second[name].handle,
                beta1_power=power1,
                beta2_power=power2,
                lr=rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8 * tf.sqrt(1 - power2),
                grad=gradients[name],
            )


def channels_last(workload: str, arrays: dict[str, np.ndarray], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The arrays as the forward functions want them."""
    if workload != "cnn":
        return arrays
    moved = dict(arrays)
    for name in ("0.weight", "2.weight", "5.weight"):
        moved[name] = arrays[name].transpose(2, 3, 1, 0)
    side = sizes["side"] // 4
    moved["9.weight"] = arrays["9.weight"].reshape(-1, 128, side, side).transpose(0, 2, 3, 1).reshape(-1, 128 * side**2)
    moved["batch/inputs"] = arrays["batch/inputs"].transpose(0, 2, 3, 1)
    return moved


def build(task: dict[str, Any]) -> Peer:
    tf.config.threading.set_intra_op_parallelism_threads(task["threads"])
    if not task["device"].startswith("cuda"):
        tf.config.set_visible_devices([], "GPU")
    sizes, rate = task["sizes"], task["learning_rate"]
    forward = FORWARD[task["workload"]]
    dtype = tf.as_dtype(task["precision"])
    with np.load(task["weights"]) as stored:
        arrays = channels_last(task["workload"], dict(stored), sizes)
    inputs, targets = (tf.constant(arrays.pop(f"batch/{name}")) for name in ("inputs", "targets"))
    weights = {name: tf.Variable(array) for name, array in arrays.items()}
    update = AdamW(weights) if task["optimizer"] == "adamw" else sgd

    def step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = tf.cast(forward(weights, inputs, sizes, dtype), tf.float32)
            flat = tf.reshape(logits, (-1, logits.shape[-1]))
            labels = tf.reshape(targets, (-1,))
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=flat))
        gradients = tape.gradient(loss, weights)
        # An embedding's gradient comes as rows; PyTorch's AdamW moves the whole table.
        update(weights, {name: tf.convert_to_tensor(g) for name, g in gradients.items()}, rate)
        return loss

    def many(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for _ in tf.range(per_call):
            loss = step(inputs, targets)
        return loss

    per_call = task["options"].get("steps_per_call", 1)
    compiled = tf.function(many if per_call > 1 else step, jit_compile=task["options"].get("jit_compile"))

    def run(steps: int) -> tf.Tensor:
        for _ in range(steps // per_call - 1):
            compiled(inputs, targets)
        return compiled(inputs, targets)

    return Peer(run, float, {"tensorflow": tf.__version__}, steps_per_call=per_call)


if __name__ == "__main__":
    serve(build)
