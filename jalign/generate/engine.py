"""Prefill, then decode with a KV cache until every row has stopped: one jitted call.

Prompts are padded on the right; a prompt goes through the model once, however many
completions are asked of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding
from jalign.generate import inputs, sampling
from jalign.generate.decode import Queue, decode
from jalign.generate.inputs import Tokens
from jalign.models import Model
from jalign.models.layers import Head
from jalign.types import Completion, PyTree

_GROW_FROM = 64  # new tokens; for fewer, two more loops to compile are not worth it


class SamplingParams(NamedTuple):
    """What may change without a new compilation; all scalars but the stop tokens."""

    temperature: Any  # float32 []
    top_k: Any  # int32 []
    top_p: Any  # float32 []
    stop_tokens: Any  # int32 [K]
    asked: Any  # int32 [], rows that count; those behind fill up


def generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    group_size: int = 1,
    batch_size: int | None = None,
    pad_to: tuple[int, int] = (1, 1),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Completion:
    """Continue each prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its prompt, its index and the key only, not on the other
    rows, the padding, the batch size or the mesh. With several processes, each one
    passes the same prompts and key and gets the same global arrays; `to_host` fetches
    them.

    Args:
      model: a causal language model; its mesh, if any, shards the rows.
      params: its parameters.
      prompts: sequences of token ids, of any lengths >= 1.
      key: PRNG key [], folded with the row index; or keys [B], one for each row.
      max_new_tokens: N, the most tokens to generate for a row.
      group_size: G, completions of each prompt. B = prompts * G rows come out, those
        of a prompt behind each other.
      batch_size: rows decoded at once; a row that stops makes room for the next one.
        None decodes all of them at once. On a mesh that cuts rows, all is best:
        a new row may have to come from another device.
      pad_to: so many prompts, and tokens of the longest one, are computed with at
        least, so that calls with fewer or shorter ones share a compilation.
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
    inputs.check_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        group_size=group_size,
        batch_size=batch_size,
    )
    inputs.check_tokens("stop_tokens", stop_tokens, model.config.vocab_size)
    inputs.check_prompts(prompts, model.config, max_new_tokens)
    asked = len(prompts) * group_size
    rows = max(pad_to[0] * group_size, asked)
    total = inputs.padded_rows(rows // group_size, model.mesh)
    seats = min(inputs.padded_rows(batch_size or rows, model.mesh), total * group_size)
    tokens, lengths = inputs.pad_prompts(prompts, total, pad_to[1])
    keys = inputs.row_keys(key, asked, total * group_size)
    settings = SamplingParams(
        np.float32(temperature if temperature > 0 else 1.0),
        np.int32(top_k),
        np.float32(top_p),
        np.asarray(stop_tokens, np.int32).reshape(-1),
        np.int32(asked),
    )
    completion, bad = _generate(
        params,
        inputs.place((tokens, lengths, keys), model.mesh),
        settings,
        model=model,
        key_impl=str(jax.random.key_impl(key)),
        rows=rows,
        seats=seats,
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        filtered=top_k > 0 or top_p < 1,
    )
    bad = np.flatnonzero(sharding.gather(bad))
    if bad.size:
        raise FloatingPointError(
            "the model's logits are NaN or infinite while sampling, in row(s) "
            f"{', '.join(map(str, bad[:8]))}{' …' if bad.size > 8 else ''} of "
            f"{asked}: look at the parameters it was given"
        )
    if asked < rows:
        completion = jax.tree.map(lambda x: x[:asked], completion)
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


def _words(params, batch, settings, *, rows, max_new_tokens, **_) -> str:
    prompts, length = batch[0].shape
    return (
        f"sampling for {prompts} x {length} tokens of prompts, {rows} completions of "
        f"{max_new_tokens}"
    )


@partial(
    sharding.announced,
    words=_words,
    static_argnames=(
        "model",
        "key_impl",
        "rows",
        "seats",
        "max_new_tokens",
        "greedy",
        "filtered",
    ),
)
def _generate(
    params, batch, settings, *, model, key_impl, rows, seats, max_new_tokens, **method
):
    """Tokens [P', W], lengths, key data -> (Completion [rows, N], bad [rows])."""
    tokens, lengths, key_data = batch
    params = model.for_decoding(params)
    head = model.head(params)
    random = _random(jax.random.wrap_key_data(key_data, impl=key_impl), max_new_tokens)
    choose = _chooser(settings, **method)

    def step(tokens, positions, cache):
        tokens, positions = tokens[:, None], positions[:, None]
        hidden, cache = model.apply(params, tokens, positions=positions, cache=cache)
        return _logits(hidden[:, 0], head, model.mesh), cache

    hidden, prompts = _prefill(model, params, tokens, lengths)
    prompt = jnp.repeat(jnp.arange(len(tokens)), len(random) // len(tokens))
    first = _first_tokens(hidden, head, prompt, random[:, 0], seats, choose, model.mesh)
    ignored = jnp.arange(len(random)) >= settings.asked
    queue = Queue(
        prompts=prompts,
        prompt=prompt,
        lengths=lengths[prompt],
        random=random,
        first=first[:2],
        # The rows that fill the batch up must not keep the loop going.
        stopped=first[2] | ignored,
        ignored=ignored,
    )
    completion, bad = decode(
        queue,
        step,
        choose,
        seats=seats,
        max_new_tokens=max_new_tokens,
        shrink=model.mesh is None,
        grow=max_new_tokens >= _GROW_FROM and model.runs_on.grow_cache,
    )
    return _without_filler(completion, bad & ~ignored, rows, model.mesh)


def _chooser(settings: SamplingParams, *, greedy: bool, filtered: bool):
    """The sampler of (logits [S, V], random [S, 2]), with its stop tokens."""
    temperature, top_k, top_p, stop_tokens, _ = settings

    def choose(logits, random):
        if greedy:
            tokens, logps = sampling.greedy(logits)
        elif filtered:
            tokens, logps = sampling.sample_filtered(
                logits, random, temperature=temperature, top_k=top_k, top_p=top_p
            )
        else:
            tokens, logps = sampling.sample(logits, random, temperature=temperature)
        return tokens, logps, (tokens[:, None] == stop_tokens[None, :]).any(-1)

    return choose


def _prefill(model, params, tokens, lengths):
    """Prompts [P, W] through the model -> last hidden states [P, D], their cache."""
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    used = (positions < lengths[:, None]).astype(jnp.int32)
    cache = model.init_cache(batch, width)
    hidden, cache = model.apply(
        params, tokens, positions=positions, segment_ids=used, cache=cache
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


def _random(keys: jax.Array, length: int) -> jax.Array:
    """What the draws of all tokens take, float32 [R, N, 2], at once.

    A step of the loop would take longer over its few keys than over its logits.
    """
    steps = jnp.arange(length, dtype=jnp.uint32)
    of_row = jax.vmap(jax.random.fold_in, (None, 0))
    return sampling.uniforms(jax.vmap(of_row, (0, None))(keys, steps))


def _first_tokens(hidden, head, prompt, random, seats, choose, mesh):
    """The first token of every row: (tokens, logps, stops), each [R]."""

    def of(hidden, random):
        return choose(_logits(hidden, head, mesh), random)

    rows = len(prompt)
    if rows == seats:  # repeated, not gathered, so that no row leaves its device
        return of(jnp.repeat(hidden, rows // len(hidden), axis=0), random)
    # In parts: the logits of all rows would be larger than those of any step.
    parts = -(-rows // seats)
    index = jnp.minimum(jnp.arange(parts * seats), rows - 1).reshape(parts, seats)
    out = jax.lax.map(
        lambda part: of(hidden[part[0]], part[1]), (prompt[index], random[index])
    )
    return jax.tree.map(lambda x: x.reshape(-1)[:rows], out)


def _logits(hidden: jax.Array, head: Head, mesh) -> jax.Array:
    """hidden [S, D] -> float32 logits [S, V]."""
    return sharding.constrain(head.logits(hidden), mesh, "batch", "act_vocab")


def _without_filler(completion: Completion, bad: jax.Array, rows: int, mesh):
    """-> (Completion [rows, N], bad [rows]), cut over the mesh where they divide."""
    if rows == len(bad):
        return jax.tree.map(
            lambda x: sharding.constrain(x, mesh, "batch", None), completion
        ), bad
    # The rows left do not divide over the mesh: give them to every device.
    whole = jax.tree.map(lambda x: sharding.constrain(x, mesh, None, None), completion)
    return jax.tree.map(lambda x: x[:rows], whole), bad[:rows]
