"""From products of queries and keys to scores: scale, ALiBi, softcap, mask."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite, so that a fully masked row gives no NaN


class Scores(NamedTuple):
    """How q k becomes a score: softcap(scale q k - slope distance). Hashable.

    Attributes:
      scale: factor on q k; None is H ** -0.5.
      softcap: c > 0 replaces each score s by c tanh(s / c), before the mask; None does
        not (arXiv:2408.00118).
      slopes: one a query head, of ALiBi (arXiv:2108.12409); () has no such bias.
      rounded: Falcon's form: scale (q k + slope key_position), where slope, position
        and their product are bfloat16. A softmax is the same for it but for rounding.
    """

    scale: float | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] = ()
    rounded: bool = False

    def factor(self, head_dim: int) -> float:
        """On q k."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale

    def scaled(self, x: jax.Array, head_dim: int) -> jax.Array:
        """x times `factor`, as a quotient where that is a root."""
        return x / math.sqrt(head_dim) if self.scale is None else x * self.scale

    @property
    def plain_only(self) -> bool:
        """Whether it needs positions of keys, which only the plain path is given."""
        return self.rounded and bool(self.slopes)

    def of_heads(self, kv_heads: int) -> np.ndarray | None:
        """The slopes, float32 [1, K, G], or None."""
        if not self.slopes:
            return None
        return np.asarray(self.slopes, np.float32).reshape(1, kv_heads, -1)

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scores with the softcap."""
        cap = self.softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def of(
        self,
        products: jax.Array,
        head_dim: int,
        q_positions: jax.Array | None,
        kv_positions: jax.Array | None,
    ) -> jax.Array:
        """Unmasked scores.

        Args:
          products: q k, float32 [B, K, G, T, S].
          head_dim: H.
          q_positions, kv_positions: int32 [B, T] and [B, S], for slopes.
        """
        slopes = self.of_heads(products.shape[1])
        if slopes is None:
            return self.capped(self.scaled(products, head_dim))
        assert q_positions is not None and kv_positions is not None
        slope = jnp.asarray(slopes)[..., None, None]
        keys = kv_positions.astype(jnp.float32)[:, None, None, None]
        if self.rounded:
            bias = slope.astype(jnp.bfloat16) * keys.astype(jnp.bfloat16)
            biased = products + bias.astype(jnp.float32)
            return self.capped(self.scaled(biased, head_dim))
        queries = q_positions.astype(jnp.float32)[:, None, None, :, None]
        scores = self.scaled(products, head_dim)
        return self.capped(scores - slope * (queries - keys))


PLAIN_SCORES = Scores()
"""q k / sqrt(H)."""


def masked_scores(
    q: jax.Array,
    k: jax.Array,
    slopes: jax.Array | None,
    queries: jax.Array,
    keys: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    window: int | None,
    how: Scores,
) -> tuple[jax.Array, jax.Array]:
    """Float32 scores [B,K,G,t,s], masked, and before that.

    Args:
      q, k: [B,K,G,t,H] and [B,K,H,s].
      slopes: float32 [1,K,G] or None.
      queries, keys: float32 [t] and [s], their places in the row.
      ids: float32 [B,t] and [B,s], their segments, or None.
      window: tokens, or None.
      how: scale, bias and cap.
    """
    scores = how.factor(q.shape[-1]) * jnp.einsum(
        "bkgth,bkhs->bkgts", q, k, preferred_element_type=jnp.float32
    )
    # Added, in float arithmetic: XLA on a CPU turns this into a third of the time of
    # comparing and selecting.
    behind = queries[:, None] - keys[None, :]
    if slopes is not None:
        scores -= slopes[..., None, None] * behind[None, None, None]
    scores = how.capped(scores)
    hidden = jnp.maximum(-behind, 0.0)
    if window is not None:
        hidden += jnp.maximum(behind - (window - 1.0), 0.0)
    hidden = hidden[None]
    if ids is not None:
        hidden = hidden + jnp.abs(ids[0][:, :, None] - ids[1][:, None, :])
    return scores + (MASKED * jnp.minimum(hidden, 1.0))[:, None, None], scores
