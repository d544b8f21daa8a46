"""A mixture of experts in the place of an MLP: a router, and ragged products.

Each token goes to the k experts that its router likes best, and none is dropped:
y = sum_j p_j expert_j(x), with p a softmax over all experts (Shazeer et al. 2017,
arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models.config import Experts
from jalign.models.layers import kernel_init


class Weight(nn.Module):
    """A matrix [D, outputs] by its name, in float32."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("weight", kernel_init, self.shape, jnp.float32)


class Kernels(nn.Module):
    """Those of all experts: gate and up [E, D, F], down [E, F, D]."""

    experts: int
    features: int
    width: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        E, D, F = self.experts, self.features, self.width
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        gate, up, down = (
            self.param(name, kernel_init, shape, jnp.float32)
            for name, shape in shapes.items()
        )
        return gate, up, down


class Routing(NamedTuple):
    """Where the tokens of a pass went.

    Attributes:
      ids: int32 [B, T, L, k], the experts of each token in each layer.
      load: float32 [E], assignments to an expert over tokens, the mean of all layers'
        tokens but padding; they sum to k.
      probability: float32 [E], the router's, the mean of the same tokens.
    """

    ids: jax.Array
    load: jax.Array
    probability: jax.Array


def route(
    experts: Experts, x: jax.Array, router: jax.Array, ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which experts each token goes to, and what they count.

    Args:
      experts: how many there are, and how many a token has.
      x: [..., D], any float dtype.
      router: [D, E].
      ids: int [..., k], the experts to take; None: those of the highest probability,
        of equal ones the first.

    Returns: the experts, int32 [..., k]; their weights, float32 [..., k]: softmax over
      all experts of x router, at these k, which sum to 1 where `normalize` says so; and
      that softmax, float32 [..., E].
    """
    logits = jnp.matmul(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    p = jax.nn.softmax(logits, axis=-1)
    if ids is None:
        weights, ids = jax.lax.top_k(p, experts.per_token)
    else:
        ids = ids.astype(jnp.int32)
        weights = jnp.take_along_axis(p, ids, axis=-1)
    if experts.normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights, p


def sums_of(ids: jax.Array, p: jax.Array, real: jax.Array) -> tuple[jax.Array, ...]:
    """Of the tokens that are `real`, bool [B, T]: assignments to each expert [E], the
    sum of p [E], and their number []; float32."""
    E = p.shape[-1]
    chosen = jnp.sum(jax.nn.one_hot(ids, E, dtype=jnp.float32), axis=-2)
    each = real[..., None].astype(jnp.float32)
    return (chosen * each).sum((0, 1)), (p * each).sum((0, 1)), each.sum()


def routing_of(noted: Any, num_layers: int) -> Routing:
    """What all layers have noted in the collection "routing"."""
    if "layers" in noted:  # scanned
        ids = jnp.moveaxis(noted["layers"]["mlp"]["ids"][0], 0, 2)
        sums = [x.sum(0) for x in noted["layers"]["mlp"]["sums"][0]]
    else:
        each = [noted[f"layers_{i}"]["mlp"] for i in range(num_layers)]
        ids = jnp.stack([layer["ids"][0] for layer in each], axis=2)
        of_layers = [layer["sums"][0] for layer in each]
        sums = jax.tree.map(lambda *x: sum(x[1:], x[0]), *of_layers)
    load, probability, count = sums
    return Routing(ids, load / count, probability / count)


def mixture(
    act,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """sum_j weights_j down(act(gate(x)) * up(x)) of each token's experts.

    Args:
      act: the activation.
      x: [M, D].
      ids, weights: [M, k], of `route`.
      gate, up, down: [E, D, F], [E, D, F] and [E, F, D], in x's dtype.

    Returns: [M, D] in x's dtype; tokens are sorted by expert, so that each expert's
      product is one of the tokens that it has (jax.lax.ragged_dot).
    """
    M, k = ids.shape
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    of_expert = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    rows = x[order // k]
    y = of_expert(act(of_expert(rows, gate)) * of_expert(rows, up), down)
    y = y.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return jnp.zeros((M, x.shape[1]), jnp.float32).at[order // k].add(y).astype(x.dtype)


def on_mesh(mesh, act, x, ids, weights, kernels, dtype: DTypeLike) -> jax.Array:
    """`mixture` of x [B, T, D], each device with its own tokens.

    Kernels are cut over `tensor` along F, and gathered over the other axes; the parts
    of the sum over F are added up.
    """

    def local(x, ids, weights, gate, up, down):
        rows, ids, weights = (y.reshape(-1, y.shape[-1]) for y in (x, ids, weights))
        y = mixture(act, rows, ids, weights, gate, up, down)
        return y.reshape(1, *x.shape)

    tokens = ("batch", "time", None)
    wide, narrow = (None, None, "act_mlp"), (None, "act_mlp", None)
    in_axes = [tokens, tokens, tokens, wide, wide, narrow]
    fn = sharding.shard_map(local, mesh, in_axes, ("act_mlp", *tokens))
    kernels = (kernel.astype(dtype) for kernel in kernels)
    return fn(x, ids, weights, *kernels).sum(axis=0)
