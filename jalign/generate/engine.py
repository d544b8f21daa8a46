"""Prefill, then decode with a KV cache until every row has stopped: one jitted call.

Prompts are padded on the right. The cache slot of a token is its position, so what
the padding left behind in the cache is overwritten before any query can see it.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding
from jalign.generate import inputs, sampling
from jalign.generate.inputs import Tokens
from jalign.models import Model
from jalign.types import Array, Completion, PyTree

logger = logging.getLogger("jalign.generate")


class SamplingParams(NamedTuple):
    """What may change without a new compilation; all scalars but the stop tokens."""

    temperature: Any  # float32 []
    top_k: Any  # int32 []
    top_p: Any  # float32 []
    stop_tokens: Any  # int32 [K]


class _State(NamedTuple):
    """The carry of the decode loop. `step` tokens of each row have been chosen."""

    step: jax.Array  # int32 []
    cache: PyTree
    completion: Completion  # [B, N]
    last: Array  # int32 [B], the newest token
    done: jax.Array  # bool [B]
    bad: jax.Array  # bool [B], logits were not finite


def generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Completion:
    """Continue each prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its prompt, its index and the key only, not on the other
    rows, the padding or the mesh. With several processes, each one passes the same
    prompts and key and gets the same global arrays; `to_host` fetches them.

    Args:
      model: a causal language model; its mesh, if any, shards the rows.
      params: its parameters.
      prompts: B sequences of token ids, of any lengths >= 1.
      key: PRNG key [], folded with the row index; or keys [B], one for each row.
      max_new_tokens: N, the most tokens to generate for a row.
      temperature: divides the logits; 0 means greedy.
      top_k: sample among the k likeliest tokens only; 0 for all.
      top_p: sample among the likeliest tokens that reach this probability only.
      stop_tokens: token ids that end a row (the stop token is part of the result).

    Returns:
      Completion with [B, N] arrays. logps are log softmax(logits / temperature) of
      the unfiltered distribution; greedy decoding reports temperature 1.

    Raises:
      ValueError: an argument out of range, naming it, or a bad prompt, naming its row.
      FloatingPointError: the model's logits were NaN or infinite, naming the rows.
    """
    inputs.check_settings(max_new_tokens, temperature, top_k, top_p)
    inputs.check_tokens("stop_tokens", stop_tokens, model.config.vocab_size)
    inputs.check_prompts(prompts, model.config, max_new_tokens)
    total = inputs.padded_rows(len(prompts), model.mesh)
    tokens, lengths = inputs.pad_prompts(prompts, total)
    keys = inputs.row_keys(key, len(prompts), total)
    settings = SamplingParams(
        np.float32(temperature if temperature > 0 else 1.0),
        np.int32(top_k),
        np.float32(top_p),
        np.asarray(stop_tokens, np.int32).reshape(-1),
    )
    completion, bad = _generate(
        params,
        inputs.place((tokens, lengths, keys), model.mesh),
        settings,
        model=model,
        key_impl=str(jax.random.key_impl(key)),
        rows=len(prompts),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        filtered=top_k > 0 or top_p < 1,
    )
    bad = np.flatnonzero(sharding.gather(bad))
    if bad.size:
        raise FloatingPointError(
            "the model's logits are NaN or infinite while sampling, in row(s) "
            f"{', '.join(map(str, bad[:8]))}{' …' if bad.size > 8 else ''} of "
            f"{len(prompts)}: look at the parameters it was given"
        )
    return completion


def to_host(completion: Completion) -> Completion:
    """The same completion as NumPy arrays [B, N], on every process."""
    return Completion(*(sharding.gather(x) for x in completion))


def completion_lists(completion: Completion) -> list[list[int]]:
    """Each row's generated token ids, stop token included, without the padding."""
    tokens, _, mask = to_host(completion)
    return [
        row[keep].tolist() for row, keep in zip(tokens, mask.astype(bool), strict=True)
    ]


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "key_impl",
        "rows",
        "max_new_tokens",
        "greedy",
        "filtered",
    ),
)
def _generate(
    params, batch, settings, *, model, key_impl, rows, max_new_tokens, **method
):
    """Tokens [B', P], lengths, key data -> (Completion [rows, N], bad [rows])."""
    tokens, lengths, key_data = batch
    logger.info(
        "compiling generate: %d rows, prompts up to %d tokens, %d new tokens",
        *tokens.shape,
        max_new_tokens,
    )
    keys = jax.random.wrap_key_data(key_data, impl=key_impl)
    choose = _chooser(settings, **method)
    # Filler rows are done before they start: they must not keep the loop going.
    filler = jnp.arange(len(tokens)) >= rows
    state = _prefill(model, params, tokens, lengths, max_new_tokens, filler)
    state = _append(*state, keys, choose)

    def unfinished(state: _State):
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def decode(state: _State):
        # The newest token, number step - 1, lies behind the prompt's `lengths`.
        positions = (lengths + state.step - 1)[:, None]
        hidden, cache = model.apply(
            params, state.last[:, None], positions=positions, cache=state.cache
        )
        logits = _logits(model, params, hidden[:, 0])
        return _append(state._replace(cache=cache), logits, keys, choose)

    state = jax.lax.while_loop(unfinished, decode, state)
    return _result(state, rows, model.mesh)


def _chooser(settings: SamplingParams, *, greedy: bool, filtered: bool):
    """The sampler as a function of (logits [B, V], keys [B]), and its stop tokens."""
    temperature, top_k, top_p, stop_tokens = settings

    def choose(logits, keys):
        if greedy:
            tokens, logps = sampling.greedy(logits)
        elif filtered:
            tokens, logps = sampling.sample_filtered(
                logits, keys, temperature=temperature, top_k=top_k, top_p=top_p
            )
        else:
            tokens, logps = sampling.sample(logits, keys, temperature=temperature)
        return tokens, logps, (tokens[:, None] == stop_tokens[None, :]).any(-1)

    return choose


def _prefill(model, params, tokens, lengths, max_new_tokens, done):
    """Run the prompts [B, P] through the model -> (empty state, logits [B, V])."""
    batch, width = tokens.shape
    cache = model.init_cache(batch, width + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    hidden, cache = model.apply(params, tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    shape = (batch, max_new_tokens)
    empty = Completion(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
    )
    completion = jax.tree.map(
        lambda x: sharding.constrain(x, model.mesh, "batch", None), empty
    )
    bad = jnp.zeros(batch, bool)
    state = _State(jnp.int32(0), cache, completion, lengths * 0, done, bad)
    return state, _logits(model, params, last)


def _logits(model, params, hidden: jax.Array) -> jax.Array:
    """hidden [B, D] -> float32 logits [B, V], as `losses.token_logps` forms them."""
    unembed = model.unembed(params).astype(hidden.dtype)
    logits = jnp.matmul(hidden, unembed, preferred_element_type=jnp.float32)
    return sharding.constrain(logits, model.mesh, "batch", "act_vocab")


def _append(state: _State, logits: jax.Array, keys: jax.Array, choose) -> _State:
    """Choose a token for each row that is not done, and write it down."""
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    tokens, logps, stops = choose(logits, step_keys)
    going = ~state.done
    news = Completion(jnp.where(going, tokens, 0), jnp.where(going, logps, 0.0), going)
    completion = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, state.step, 1),
        state.completion,
        news,
    )
    # The maximum is NaN if any logit is, and -inf if none is possible.
    bad = going & ~jnp.isfinite(jnp.max(logits, axis=-1))
    return _State(
        state.step + 1,
        state.cache,
        completion,
        news.tokens,
        state.done | stops | bad,
        state.bad | bad,
    )


def _result(state: _State, rows: int, mesh):
    """Drop the filler rows -> (Completion [rows, N], bad [rows])."""
    bad, completion = state.bad[:rows], state.completion
    if rows != len(state.bad):
        # The rows left do not divide over the mesh: give them to every device.
        completion = jax.tree.map(
            lambda x: sharding.constrain(x, mesh, None, None)[:rows], completion
        )
    return completion, bad
