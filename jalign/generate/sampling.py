"""Token samplers: logits and random numbers in, tokens and their log-probabilities out.

Every sampler returns log softmax(logits / temperature) of the token it chose, taken
*before* top-k and top-p cut the tail. That is the number a trainer recomputes with
`losses.token_logps(..., temperature=temperature)`, so the importance ratio is 1 at
the first update; renormalised log-probabilities would bias it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding

_fold_in = jax.vmap(jax.random.fold_in, (None, 0))  # a key, uint32 [n] -> keys [n]


def _chosen(logps: jax.Array, tokens: jax.Array) -> jax.Array:
    """log-probs [B, V] and tokens [B] -> the tokens' log-probs [B]."""
    return jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest token of each row; ties go to the lowest id.

    Args:
      logits: float [B, V].

    Returns:
      tokens int32 [B]; logps float32 [B], nats, at temperature 1.
    """
    logits = logits.astype(jnp.float32)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, _chosen(jax.nn.log_softmax(logits), tokens)


def uniforms(keys: jax.Array) -> jax.Array:
    """The random numbers that a draw takes: PRNG keys [...] -> float32 [..., 2]."""
    draw = functools.partial(jax.random.uniform, shape=(2,))
    return jax.vmap(draw)(keys.reshape(-1)).reshape(*keys.shape, 2)


def draws(keys: jax.Array, length: int) -> jax.Array:
    """The `uniforms` of all tokens of rows: their keys [R] -> float32 [R, N, 2].

    At once: a step of decoding would take longer over its few keys than over its
    logits.
    """
    steps = jnp.arange(length, dtype=jnp.uint32)
    return uniforms(jax.vmap(_fold_in, (0, None))(keys, steps))


def row_keys(key: jax.Array, rows: int, total: int) -> np.ndarray:
    """Key data uint32 [total, ...]: key folded with the row index, or keys as given.

    Raises: ValueError if key is no typed PRNG key, or not [] or [rows].
    """
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError("key must be a typed PRNG key, from jax.random.key(seed)")
    if key.shape not in ((), (rows,)):
        raise ValueError(f"key must be one key or {rows}, one a row; got {key.shape}")
    keys = key if key.ndim else jax.jit(_fold_in)(key, np.arange(rows, dtype=np.uint32))
    data = sharding.gather(keys)
    return np.pad(data, [(0, total - rows)] + [(0, 0)] * (data.ndim - 1))


def sample(
    logits: jax.Array, random: jax.Array, *, temperature: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draw each row's token from softmax(logits / temperature).

    Args:
      logits: float [B, V].
      random: float32 [B, 2], `uniforms` of one key for each row, so that a row's draw
        does not depend on its neighbours.
      temperature: float > 0, may be traced.

    Returns:
      tokens int32 [B]; logps float32 [B], nats.
    """
    return _draw(logits.astype(jnp.float32) / temperature, random, None)


def sample_filtered(
    logits: jax.Array,
    random: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Like `sample`, but only among the likeliest tokens of each row.

    Nothing is sorted: the last logit that stays is found by bisection, some 50 sums
    over the row. Where logits tie the lower id ranks first.

    Args:
      logits: float [B, V].
      random: float32 [B, 2], see `uniforms`.
      temperature: float > 0, may be traced.
      top_k: int, keep the k likeliest; 0 keeps all. May be traced.
      top_p: float in (0, 1], keep the smallest set of likeliest tokens whose
        probability reaches top_p (Holtzman et al. 2020, arXiv:1904.09751); the
        likeliest one always stays. May be traced. It works on what top_k left,
        renormalised, as in transformers.

    Returns:
      tokens int32 [B]; logps float32 [B], nats, of the unfiltered distribution.
    """
    logits = logits.astype(jnp.float32) / temperature
    keep = _first(logits, jnp.ones_like(logits), top_k) | jnp.equal(top_k, 0)
    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.where(keep, jnp.exp(logits - top), 0.0)
    nucleus = _first(logits, mass, top_p * jnp.sum(mass, axis=-1))
    # Rounding in the sum must not cut the tail when top-p is off.
    keep &= nucleus | jnp.greater_equal(top_p, 1.0)
    return _draw(logits, random, keep)


def sampler_for(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Callable, dict[str, Any]]:
    """(sampler of logits and random numbers, the scalars that it takes, as arrays).

    The same function for all settings of a kind, so that they share a compilation.
    """
    if temperature == 0:
        return _greedy, {}
    scalars: dict[str, Any] = {"temperature": np.float32(temperature)}
    if top_k == 0 and top_p == 1:
        return sample, scalars
    filters = {"top_k": np.int32(top_k), "top_p": np.float32(top_p)}
    return sample_filtered, scalars | filters


def _greedy(logits: jax.Array, random: jax.Array):
    return greedy(logits)


def _draw(
    logits: jax.Array, random: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens in proportion to exp(logits) where `keep`, with logps of all of them.

    By inversion in two steps, first of blocks of tokens and then of the tokens of a
    block: two uniform numbers a row, where Gumbel noise takes one a token.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    normalizer = top[:, 0] + jnp.log(jnp.sum(weights, axis=-1))
    if keep is not None:
        weights = jnp.where(keep, weights, 0.0)
    vocab_size = logits.shape[-1]
    width = 2 ** math.ceil(math.log2(vocab_size) / 2)
    weights = jnp.pad(weights, ((0, 0), (0, -vocab_size % width)))
    blocks = weights.reshape(len(weights), -1, width)
    block = _invert(jnp.sum(blocks, axis=-1), random[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    tokens = block * width + _invert(inside, random[:, 1])
    # NaN anywhere makes the sums NaN, and any comparison with them false.
    return tokens, _chosen(logits, tokens) - normalizer


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the running sum passes uniform * total; [B, n], [B] -> [B]."""
    sums = jnp.cumsum(weights, axis=-1)
    passed = jnp.sum(sums <= uniform[:, None] * sums[:, -1:], axis=-1)
    # Rounding may reach the total: the last index of some weight then.
    index = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    return jnp.minimum(passed.astype(jnp.int32), last)


def _first(logits: jax.Array, mass: jax.Array, target: jax.Array | int) -> jax.Array:
    """The fewest likeliest tokens of each row whose mass reaches a target.

    Args:
      logits: float32 [B, V]; they and then the lower ids rank.
      mass: float32 [B, V], >= 0.
      target: [B] or a scalar, > 0; out of reach it keeps all.

    Returns: bool [B, V].
    """
    ranks = _ordered(logits)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    target = jnp.broadcast_to(jnp.asarray(target, jnp.float32), logits.shape[:1])

    def mass_of(kept):
        return jnp.sum(jnp.where(kept, mass, 0.0), axis=-1)

    lowest, highest = jnp.min(ranks, axis=-1), jnp.max(ranks, axis=-1)
    bar = _bisect(lambda x: mass_of(ranks >= x[:, None]) >= target, lowest, highest)
    above, tied = ranks > bar[:, None], ranks == bar[:, None]
    over = mass_of(above)

    def enough(last):  # negated: the smallest last id, by the same bisection
        return over + mass_of(tied & (ids <= -last[:, None])) >= target

    first, end = jnp.full_like(bar, 1 - logits.shape[1]), jnp.zeros_like(bar)
    last = -_bisect(enough, first, end)
    return above | (tied & (ids <= last[:, None]))


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order, -0.0 beside 0.0."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _bisect(holds: Callable, low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest int32 x [B] in [low, high] that holds; low where none does.

    `holds` must be true up to some x and false beyond.
    """

    def halve(_, span):
        low, high = span
        # Rounded up, and without overflow; (low | high) - (low ^ high) // 2.
        middle = (low | high) - ((low ^ high) >> 1)
        yes = holds(middle)
        return jnp.where(yes, middle, low), jnp.where(yes, high, middle - 1)

    low, high = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.minimum(low, high)
