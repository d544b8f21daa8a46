"""A test double with a model's interface, small enough to check by hand."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Slot p holds the embedding of the token at position p: [B, S, V]."""

    slots: jax.Array


@dataclass(frozen=True)
class HistoryModel:
    """Hidden states are a decaying sum over all earlier tokens: it needs its cache.

    hidden_p = sum over s <= p of 0.7^(p - s) embed[token_s]; logits = hidden @ table.
    """

    vocab_size: int = 11
    max_position: int = 64
    mesh: Any = None
    num_labels: int = 0

    @property
    def config(self):
        return SimpleNamespace(
            vocab_size=self.vocab_size,
            max_position=self.max_position,
            num_labels=self.num_labels,
            eos_token_ids=(),
        )

    def init(self, key):
        keys = jax.random.split(key)
        shape = (self.vocab_size, self.vocab_size)
        return {
            "embed": jax.random.normal(keys[0], shape),
            "table": jax.random.normal(keys[1], shape),
        }

    def init_cache(self, batch, length):
        # Garbage, so that a slot which is read before it is written shows.
        return Cache(jnp.full((batch, length, self.vocab_size), 1e3))

    def apply(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        batch, time = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)
        x = params["embed"][tokens]
        if cache is None:
            slots = x
        else:
            slots = jax.vmap(lambda s, p, new: s.at[p].set(new))(
                cache.slots, positions, x
            )
        age = positions[:, :, None] - jnp.arange(slots.shape[1])[None, None, :]
        weights = jnp.where(age >= 0, 0.7 ** jnp.maximum(age, 0), 0.0)
        hidden = jnp.einsum("bts,bsv->btv", weights, slots)
        return hidden, None if cache is None else Cache(slots)

    def unembed(self, params):
        return params["table"]

    def score(self, params, hidden):
        return hidden[..., 0]


@dataclass(frozen=True)
class UniformModel(HistoryModel):
    """All tokens are equally likely, always."""

    def unembed(self, params):
        return jnp.zeros_like(params["table"])
