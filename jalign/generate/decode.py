"""The compiled program: prompts through the model once, then token by token.

A row's tokens depend on its prompt and its key only. Once few rows go on, the loop goes
on with fewer of them; and the cache may grow on the way, since attention reads all of
it. All of that is one program.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jalign import sharding
from jalign.generate import sampling
from jalign.models import cache as kv
from jalign.types import Completion

Step = Callable[[jax.Array, jax.Array, kv.KVCache], tuple[jax.Array, kv.KVCache]]
"""(tokens [R], positions [R], cache) -> (logits float32 [R, V], cache)."""

Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""(logits [R, V], random [R, 2]) -> tokens int32, logps float32, stops bool; [R]."""

_SHRINK = 4  # the loop goes on with a quarter of its rows, when no more are at work
_MIN_ROWS = 4
_GROW = (4, 2)  # the cache begins with a quarter of its slots, goes on with a half
_GROW_FROM = 64  # new tokens; for fewer, two more loops to compile are not worth it


class Rows(NamedTuple):
    """What is decoded together: [R], and [R, N] what each row has written.

    Attributes:
      lengths: int32, of the prompts.
      random: float32 [R, N, 2], for the draw of each token.
      done: bool; a row that fills the batch up is so from the start.
      bad: bool, the logits were not finite.
      last: int32, the newest token.
      written: Completion [R, N].
    """

    lengths: jax.Array
    random: jax.Array
    done: jax.Array
    bad: jax.Array
    last: jax.Array
    written: Completion


def fresh_rows(lengths: jax.Array, random: jax.Array, done: jax.Array) -> Rows:
    """Rows that have written nothing, see Rows."""
    shape = random.shape[:2]
    none = jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
    bad, last = jnp.zeros_like(done), jnp.zeros_like(lengths)
    return Rows(lengths, random, done, bad, last, Completion(*none))


def decode(
    rows: Rows,
    logits: jax.Array,
    cache: kv.KVCache,
    step: Step,
    choose: Choose,
    *,
    shrink: bool = True,
    grow: bool = False,
) -> tuple[Completion, jax.Array]:
    """Continues every row until it stops or has N tokens.

    Args:
      rows: R fresh ones.
      logits: float32 [R, V], of their first tokens.
      cache: with their prompts, and no free slots.
      step: the model.
      choose: the sampler.
      shrink: go on with fewer rows when few are at work; moves them between devices.
      grow: add slots to the cache as they are needed. Each number of slots is a loop of
        its own to compile.

    Returns: Completion [R, N], and bool [R]: the logits were not finite.
    """
    width, length = kv.slots(cache), rows.random.shape[1]

    def body(state):
        rows, cache, time = state
        position = jnp.where(rows.done, kv.NEVER, rows.lengths + time)
        logits, cache = step(rows.last, position, cache)
        return _write(rows, time + 1, logits, choose), cache, time + 1

    rows, time, left = _write(rows, 0, logits, choose), jnp.int32(0), []
    for part in _parts(len(rows.done), length, shrink, grow):
        if part.rows < len(rows.done):
            keep = jnp.argsort(rows.done, stable=True)[: part.rows]
            left.append((rows, keep))
            rows = jax.tree.map(lambda x, keep=keep: x[keep], rows)
            cache = kv.take_rows(cache, keep)
        cache = kv.lengthen(cache, width + part.slots - kv.slots(cache))

        def busy(state, part=part) -> jax.Array:
            rows, _, time = state
            room = time < min(part.slots, length - 1)
            return room & (jnp.sum(~rows.done) > part.fewer)

        rows, cache, time = jax.lax.while_loop(busy, body, (rows, cache, time))
    found = rows.written, rows.bad
    for more, keep in reversed(left):
        found = jax.tree.map(
            lambda every, some, keep=keep: every.at[keep].set(some),
            (more.written, more.bad),
            found,
        )
    return found


def _write(rows: Rows, place: jax.Array | int, logits: jax.Array, choose: Choose):
    """Chooses a token for each row that is not done, and writes it at a place of N."""
    draw = jax.lax.dynamic_index_in_dim(rows.random, place, axis=1, keepdims=False)
    tokens, logps, stops = choose(logits, draw)
    going = ~rows.done
    bad = going & jnp.isnan(logps)

    def write(every: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.where(going, new, jnp.zeros_like(new))
        return jax.lax.dynamic_update_index_in_dim(every, new, place, axis=1)

    return rows._replace(
        done=rows.done | stops | bad,
        bad=rows.bad | bad,
        last=tokens,
        written=jax.tree.map(write, rows.written, Completion(tokens, logps, going)),
    )


class _Part(NamedTuple):
    """A part of the loop: over when no more than `fewer` rows are at work.

    Or when its slots are full, if they are fewer than the new tokens.
    """

    rows: int
    slots: int  # behind the prompts
    fewer: int


def _parts(rows: int, length: int, shrink: bool, grow: bool) -> list[_Part]:
    """More and more slots, all rows; then a quarter of the rows, and so on."""
    sizes = [rows]
    while shrink and sizes[-1] // _SHRINK >= _MIN_ROWS:
        sizes.append(sizes[-1] // _SHRINK)
    fewer = [*sizes[1:], 0]
    slots = sorted({max(1, length // share) for share in _GROW}) if grow else []
    growing = [_Part(rows, n, fewer[0]) for n in slots]
    return growing + [_Part(n, length, m) for n, m in zip(sizes, fewer, strict=True)]


def _words(params, batch, settings, *, rows, max_new_tokens, **_) -> str:
    prompts, length = batch[0].shape
    return (
        f"sampling for {prompts} x {length} tokens of prompts, {rows} completions of "
        f"{max_new_tokens}"
    )


@partial(
    sharding.announced,
    words=_words,
    static_argnames=("model", "draw", "key_impl", "rows", "max_new_tokens"),
)
def complete(params, batch, settings, *, model, draw, key_impl, rows, max_new_tokens):
    """The whole of `generate` on a device, see there.

    Args:
      params: of the model.
      batch: tokens int32 [P, W], lengths int32 [P] and key data [R, ...]: prompts on
        the left, R / P rows of each of them.
      settings: what may change without a new compilation: the sampler's scalars; stop
        tokens int32 [K]; int32, the rows that count.
      model, draw, key_impl, rows, max_new_tokens: static. draw is the sampler, of
        (logits, random, **scalars). The first `rows` of R are given back; those behind
        them fill the batch up.

    Returns: Completion [rows, N], and bool [rows]: the logits were not finite.
    """
    tokens, lengths, key_data = batch
    scalars, stop_tokens, asked = settings
    params = model.for_decoding(params)
    head = model.head(params)
    keys = jax.random.wrap_key_data(key_data, impl=key_impl)
    random = sampling.draws(keys, max_new_tokens)

    def logits_of(hidden):
        return sharding.constrain(head.logits(hidden), model.mesh, "batch", "act_vocab")

    def step(tokens, positions, cache):
        tokens, positions = tokens[:, None], positions[:, None]
        hidden, cache = model.apply(params, tokens, positions=positions, cache=cache)
        return logits_of(hidden[:, 0]), cache

    def choose(logits, random):
        tokens, logps = draw(logits, random, **scalars)
        return tokens, logps, (tokens[:, None] == stop_tokens[None, :]).any(-1)

    hidden, cache = _prefill(model, params, tokens, lengths)
    # Repeated, not gathered, so that no row leaves its device.
    group = len(random) // len(tokens)
    lengths, hidden = (jnp.repeat(x, group, axis=0) for x in (lengths, hidden))
    # The rows that fill the batch up must not keep the loop going.
    filler = jnp.arange(len(random)) >= asked
    completion, bad = decode(
        fresh_rows(lengths, random, filler),
        logits_of(hidden),
        kv.repeat_rows(cache, group),
        step,
        choose,
        shrink=model.mesh is None,
        grow=max_new_tokens >= _GROW_FROM and model.runs_on.grow_cache,
    )
    # Rows left that do not divide over the mesh are given to every device.
    axis = "batch" if rows == len(bad) else None
    completion = jax.tree.map(
        lambda x: sharding.constrain(x, model.mesh, axis, None)[:rows], completion
    )
    return completion, bad[:rows]


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
