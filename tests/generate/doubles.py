"""A test double with a model's interface, small enough to check by hand."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jalign.models import cache as kv
from jalign.models.layers import Head
from jalign.models.platform import CPU


@dataclass(frozen=True)
class HistoryModel:
    """Hidden states are a decaying sum over all earlier tokens: it needs its cache.

    hidden_p = sum over s <= p of 0.7^(p - s) embed[token_s]; logits = hidden @ table.
    """

    vocab_size: int = 11
    max_position: int = 64
    mesh: Any = None
    num_labels: int = 0
    runs_on = CPU

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
        # Garbage, so that a slot which is seen before it is written shows.
        k = jnp.full((1, batch, 1, self.vocab_size, length), 1e3)
        v = jnp.zeros((1, batch, 1, length, 0))
        positions = jnp.full((batch, length), kv.NEVER, jnp.int32)
        return kv.KVCache(k, v, positions, jnp.int32(0))

    def for_decoding(self, params):
        return params

    def on_decoding_mesh(self, params, batch, length):
        return self, lambda params: params

    def apply(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, seen, visible = params["embed"][tokens], positions, True
        if cache is None and segment_ids is not None:
            visible = segment_ids[:, :, None] == segment_ids[:, None, :]
        if cache is not None:
            seen = positions
            if segment_ids is not None:
                seen = jnp.where(segment_ids == 0, kv.NEVER, positions)
            slot, cache = cache.next, kv.advance(cache, seen)
            k, x = kv.write_keys(cache.k, 0, slot, x[:, :, None, :])
            cache, x, seen = cache._replace(k=k), x[:, :, 0], cache.positions
        age = positions[:, :, None] - seen[:, None, :]
        weights = jnp.where(visible & (age >= 0), 0.7 ** jnp.maximum(age, 0), 0.0)
        return jnp.einsum("bts,bsv->btv", weights, x), cache

    def head(self, params):
        return Head(self.unembed(params))

    def unembed(self, params):
        return params["table"]

    def score(self, params, hidden):
        return hidden[..., 0]


@dataclass(frozen=True)
class UniformModel(HistoryModel):
    """All tokens are equally likely, always."""

    def unembed(self, params):
        return jnp.zeros_like(params["table"])
