"""Scalar heads: reward models and critics are a decoder with one output."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def init_score_head(key: jax.Array, hidden_size: int) -> dict[str, jax.Array]:
    """A new head, {"kernel": float32 [D, 1]}, normal with variance 1 / (D + 1).

    Source: Stiennon et al. 2020 (arXiv:2009.01325), as Huang et al. 2024
    (arXiv:2403.17031) describe it.
    """
    kernel = jax.random.normal(key, (hidden_size, 1), jnp.float32)
    return {"kernel": kernel / math.sqrt(hidden_size + 1)}


def score(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Scalar of every position in float32: hidden [B, T, D] -> [B, T]."""
    kernel = params["score"]["kernel"].astype(jnp.float32)
    return jnp.einsum("btd,do->bto", hidden.astype(jnp.float32), kernel)[..., 0]
