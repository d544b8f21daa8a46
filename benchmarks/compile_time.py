"""How long the TPU's compiler takes for our training step, beside a plain one.

    python -m benchmarks.compile_time [TURNS]

traces and compiles the step of `sft-8b-v5e-4x4` (benchmarks.tpu_compiled, rows of
1,024 tokens) and that of
a transformer of the same sizes as one would write it down: a scan over recomputed
blocks, attention and logits as they stand in the papers, optax.adamw. In turn; prints
CPU-seconds of each, and their ratio. It needs libtpu and no TPU.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.tpu_compiled import CASES, MODELS, config_of
from jalign import sharding
from jalign.plan.recipes import compiled_step

# Short rows, since plain attention holds the scores of all pairs of tokens.
CASE = next(case for case in CASES if case.name == "sft-8b-v5e-4x4")
CASE = CASE._replace(max_length=1024)
C = MODELS[CASE.model]
V, D, F, L, H = C.vocab_size, C.hidden_size, C.intermediate_size, C.num_layers, 128
N, K = C.num_heads, C.num_kv_heads
# Shapes, and the axis that is cut over the devices.
LAYERS = {"q": ((L, D, N, H), 1), "k": ((L, D, K, H), 1), "v": ((L, D, K, H), 1)}
LAYERS |= {"o": ((L, N, H, D), 3), "gate": ((L, D, F), 1), "up": ((L, D, F), 1)}
LAYERS |= {"down": ((L, F, D), 2), "norm1": ((L, D), 1), "norm2": ((L, D), 1)}
REST = {"embed": ((V, D), 1), "norm": ((D,), 0), "unembed": ((D, V), 0)}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    return (y * scale).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """[B, T, N, H], each pair of features turned by its position."""
    angles = jnp.arange(x.shape[1])[:, None] / 5e5 ** (jnp.arange(H // 2) / (H // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def block(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
    w = {name: y.astype(x.dtype) for name, y in layer.items()}
    y = norm(x, layer["norm1"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", y, w[name]) for name in "qkv")
    k, v = (jnp.repeat(z, N // K, axis=2) for z in (rotated(k), v))
    scores = jnp.einsum("btnh,bsnh->bnts", rotated(q), k).astype(jnp.float32) / H**0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(x.dtype)
    y = jnp.einsum("bnts,bsnh->btnh", weights, v)
    x += jnp.einsum("btnh,nhd->btd", y, w["o"])
    y = norm(x, layer["norm2"])
    wide = jax.nn.silu(jnp.einsum("btd,df->btf", y, w["gate"]))
    wide *= jnp.einsum("btd,df->btf", y, w["up"])
    return x + jnp.einsum("btf,fd->btd", wide, w["down"])


def loss(params: dict[str, Any], tokens: jax.Array, rows: NamedSharding) -> jax.Array:
    def body(x, layer):
        x = jax.checkpoint(block)(x, layer)
        return jax.lax.with_sharding_constraint(x, rows), None

    x = params["embed"][tokens].astype(jnp.bfloat16)
    x = jax.lax.with_sharding_constraint(x, rows)
    x, _ = jax.lax.scan(body, x, params["layers"])
    x = norm(x, params["norm"])
    logits = jnp.einsum("btd,dv->btv", x, params["unembed"].astype(x.dtype))
    logps = jax.nn.log_softmax(logits.astype(jnp.float32)[:, :-1])
    return -jnp.take_along_axis(logps, tokens[:, 1:, None], -1).mean()


def compiled_plain(mesh: jax.sharding.Mesh) -> Any:
    """The plain step, compiled."""
    tx = optax.adamw(1e-5)

    def array(shape, cut, dtype=jnp.float32):
        spec: list[Any] = [None] * len(shape)
        spec[cut] = "fsdp"
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params: dict[str, Any] = {name: array(*row) for name, row in REST.items()}
    params["layers"] = {name: array(*row) for name, row in LAYERS.items()}
    state = jax.eval_shape(tx.init, params)
    state = optax.tree.map_params(
        tx,
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p.sharding),
        state,
        params,
    )

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = array((CASE.batch_size, CASE.max_length), 0, jnp.int32)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None))
    return jitted.lower(params, state, tokens).compile()


def cpu_seconds(function: Callable[[], Any]) -> float:
    jax.clear_caches()
    start = time.process_time()
    function()
    return time.process_time() - start


def main(turns: int) -> None:
    devices = sharding.topology_devices(CASE.topology)
    mesh = sharding.make_mesh(devices=devices, **sharding.parse_mesh(CASE.mesh))
    for _ in range(turns):
        plain = cpu_seconds(lambda: compiled_plain(mesh))
        ours = cpu_seconds(lambda: compiled_step(config_of(CASE), C, mesh))
        words = f"plain {plain:.0f} CPU-s, jalign {ours:.0f}, ratio {ours / plain:.2f}"
        print(words, flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # to trace on; the TPU is described
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
