"""Token samplers: logits and keys in, tokens and their log-probabilities out.

Every sampler returns log softmax(logits / temperature) of the token it chose, taken
*before* top-k and top-p cut the tail. That is the number a trainer recomputes with
`losses.token_logps(..., temperature=temperature)`, so the importance ratio is 1 at
the first update; renormalised log-probabilities would bias it.
"""

import jax
import jax.numpy as jnp


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


def sample(
    logits: jax.Array, keys: jax.Array, *, temperature: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draw each row's token from softmax(logits / temperature).

    Args:
      logits: float [B, V].
      keys: PRNG keys [B], one for each row, so that a row's draw does not depend on
        its neighbours; consumed.
      temperature: float > 0, may be traced.

    Returns:
      tokens int32 [B]; logps float32 [B], nats.
    """
    logps = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    tokens = jax.vmap(jax.random.categorical)(keys, logps).astype(jnp.int32)
    return tokens, _chosen(logps, tokens)


def _keep(
    logps: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float
) -> jax.Array:
    """Which ranks survive: log-probs [B, V] sorted downwards -> bool [B, V].

    top-k cuts first and top-p then works on what it left, renormalised, as
    transformers orders them.
    """
    ranks = jax.lax.broadcasted_iota(jnp.int32, logps.shape, 1)
    in_top_k = (ranks < top_k) | jnp.equal(top_k, 0)
    probs = jnp.where(in_top_k, jnp.exp(logps), 0.0)
    before = jnp.cumsum(probs, axis=-1) - probs
    in_top_p = before < top_p * jnp.sum(probs, axis=-1, keepdims=True)
    # Rounding in the sum must not cut the tail when top-p is off, nor the head ever.
    return in_top_k & (in_top_p | jnp.greater_equal(top_p, 1.0) | (ranks == 0))


def sample_filtered(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Like `sample`, but only among the likeliest tokens of each row.

    Sorting costs O(V log V) a row, so `sample` is apart. The draw happens in sorted
    order: exactly top_k ranks survive even where logits tie.

    Args:
      logits: float [B, V].
      keys: PRNG keys [B], consumed.
      temperature: float > 0, may be traced.
      top_k: int, keep the k likeliest; 0 keeps all. May be traced.
      top_p: float in (0, 1], keep the smallest set of likeliest tokens whose
        probability reaches top_p (Holtzman et al. 2020, arXiv:1904.09751); the
        likeliest one always stays. May be traced.

    Returns:
      tokens int32 [B]; logps float32 [B], nats, of the unfiltered distribution.
    """
    logps = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    order = jnp.argsort(logps, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logps, order, axis=-1)
    kept = jnp.where(_keep(ranked, top_k, top_p), ranked, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, kept)
    tokens = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), _chosen(logps, tokens)
