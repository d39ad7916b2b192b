"""The same models in plain JAX under `jax.jit`, with donated weights and state. Needs jax alone.

Layouts are the ones that XLA likes: images and kernels with channels last. `bfloat16` casts the inputs of products and
convolutions, as autocast does. Option: `steps_per_call`, that many steps scanned in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.protocol import Peer, serve

Weights = dict[str, jax.Array]


def dense(weights: Weights, name: str, x: jax.Array, dtype: Any) -> jax.Array:
    """x @ W.T + b, with PyTorch's layout of W."""
    product = x.astype(dtype) @ weights[f"{name}.weight"].astype(dtype).T
    bias = weights.get(f"{name}.bias")
    return product if bias is None else product + bias.astype(dtype)


def mlp(weights: Weights, x: jax.Array, sizes: dict[str, int], dtype: Any) -> jax.Array:
    return dense(weights, "2", jax.nn.relu(dense(weights, "0", x, dtype)), dtype)


def cnn(weights: Weights, x_BHWC: jax.Array, sizes: dict[str, int], dtype: Any) -> jax.Array:
    for name, pool in (("0", False), ("2", True), ("5", True)):
        kernel = weights[f"{name}.weight"].astype(dtype)
        x_BHWC = jax.lax.conv_general_dilated(
            x_BHWC.astype(dtype), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x_BHWC = jax.nn.relu(x_BHWC + weights[f"{name}.bias"].astype(dtype))
        if pool:
            x_BHWC = jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(weights, "9", x_BHWC.reshape(x_BHWC.shape[0], -1), dtype)


def layer_norm(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def transformer(weights: Weights, tokens_BT: jax.Array, sizes: dict[str, int], dtype: Any) -> jax.Array:
    x = weights["token.weight"][tokens_BT] + weights["position.weight"][: tokens_BT.shape[1]]
    batch, tokens, width = x.shape
    for layer in range(sizes["layers"]):
        at = f"blocks.{layer}."
        qkv = dense(weights, at + "qkv", layer_norm(weights, at + "norm1", x), dtype)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, sizes["heads"], -1), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(weights, at + "out", mixed.reshape(batch, tokens, width), dtype)
        up = jax.nn.gelu(dense(weights, at + "up", layer_norm(weights, at + "norm2", x), dtype), approximate=True)
        x = x + dense(weights, at + "down", up, dtype)
    return dense(weights, "head", layer_norm(weights, "norm", x), dtype)


def lstm(weights: Weights, tokens_TB: jax.Array, sizes: dict[str, int], dtype: Any) -> jax.Array:
    x_TBD = weights["token.weight"][tokens_TB]
    for layer in range(sizes["layers"]):
        name = f"lstm.{{}}_{{}}_l{layer}"
        get = {(kind, of): weights[name.format(kind, of)] for kind in ("weight", "bias") for of in ("ih", "hh")}
        # The inputs' product for all times at once; the scan is left with the recurrent one.
        gates_TBG = x_TBD.astype(dtype) @ get["weight", "ih"].astype(dtype).T
        gates_TBG = gates_TBG + (get["bias", "ih"] + get["bias", "hh"]).astype(dtype)
        recurrent = get["weight", "hh"].astype(dtype).T

        def cell(carry: Any, gates_BG: jax.Array, recurrent: jax.Array = recurrent) -> Any:
            hidden, memory = carry
            i, f, g, o = jnp.split(gates_BG + hidden @ recurrent, 4, axis=-1)
            memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(memory)
            return (hidden, memory), hidden

        start = jnp.zeros((tokens_TB.shape[1], sizes["width"]), dtype)
        _, x_TBD = jax.lax.scan(cell, (start, start), gates_TBG)
    return dense(weights, "head", x_TBD, dtype)


FORWARD: dict[str, Callable[..., jax.Array]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "lstm": lstm,
}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits.astype(jnp.float32).reshape(-1, logits.shape[-1]))
    return -jnp.take_along_axis(logs, targets.reshape(-1, 1), axis=-1).mean()


def sgd(weights: Weights, gradients: Weights, state: Any, rate: float) -> tuple[Weights, Any]:
    return jax.tree.map(lambda w, g: w - rate * g, weights, gradients), state


def adamw(weights: Weights, gradients: Weights, state: Any, rate: float) -> tuple[Weights, Any]:
    """PyTorch's AdamW (Loshchilov and Hutter, 2019, algorithm 2) with its defaults."""
    count, first, second = state
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
    debias1, debias2 = 1 - 0.9**count, jnp.sqrt(1 - 0.999**count)
    weights = jax.tree.map(
        lambda w, m, v: w * (1 - rate * 0.01) - rate / debias1 * m / (jnp.sqrt(v) / debias2 + 1e-8),
        weights,
        first,
        second,
    )
    return weights, (count, first, second)


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
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 is to mean float32 for every peer
    jax.config.update("jax_platforms", "cuda" if task["device"].startswith("cuda") else "cpu")
    sizes, rate = task["sizes"], task["learning_rate"]
    forward = FORWARD[task["workload"]]
    dtype = jnp.dtype(task["precision"])
    with np.load(task["weights"]) as stored:
        arrays = channels_last(task["workload"], dict(stored), sizes)
    inputs, targets = (jnp.asarray(arrays.pop(f"batch/{name}")) for name in ("inputs", "targets"))
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = (jnp.zeros(()), zeros, jax.tree.map(jnp.zeros_like, weights)) if task["optimizer"] == "adamw" else ()
    update = adamw if task["optimizer"] == "adamw" else sgd

    def loss_of(weights: Weights, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(forward(weights, inputs, sizes, dtype), targets)

    def step(weights: Weights, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(weights, inputs, targets)
        return *update(weights, gradients, state, rate), loss

    def many(weights: Weights, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        def one(carry: Any, batch: Any) -> Any:
            weights, state, loss = step(*carry, *batch)
            return (weights, state), loss

        (weights, state), losses = jax.lax.scan(one, (weights, state), (inputs, targets))
        return weights, state, losses[-1]

    per_call = task["options"].get("steps_per_call", 1)
    if per_call > 1:
        inputs, targets = (jnp.stack([array] * per_call) for array in (inputs, targets))
    compiled = jax.jit(many if per_call > 1 else step, donate_argnums=(0, 1))
    current = [weights, state]

    def run(steps: int) -> jax.Array:
        weights, state = current
        for _ in range(steps // per_call):
            weights, state, loss = compiled(weights, state, inputs, targets)
        current[:] = weights, state
        return loss

    return Peer(run, float, {"jax": jax.__version__}, steps_per_call=per_call)


if __name__ == "__main__":
    serve(build)
