"""The decode loop: seats that rows of a queue take, until every row has stopped.

A seat decodes one row. A row that stops gives its seat to the next one in the queue,
so that early stops are not paid for; once the queue is empty and few seats are taken,
the loop goes on with fewer. The cache may grow on the way, since attention reads all of
it. All of it is one compiled program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jalign.models import cache as kv
from jalign.types import Completion

Step = Callable[[jax.Array, jax.Array, kv.KVCache], tuple[jax.Array, kv.KVCache]]
"""(tokens [S], positions [S], cache) -> (logits float32 [S, V], cache)."""

Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""(logits [S, V], random [S, 2]) -> tokens int32, logps float32, stops bool; [S]."""

_SHRINK = 4  # the loop goes on with a quarter of its seats, when no more are taken
_MIN_SEATS = 4
_GROW = (4, 2)  # the cache begins with a quarter of its slots, goes on with a half


class Queue(NamedTuple):
    """All rows, of which each has its first token already.

    Attributes:
      prompts: a cache of P slots with every prompt.
      prompt: int32 [R], the prompt of each row.
      lengths: int32 [R], of the prompt.
      random: float32 [R, N, 2], for the draw of each token of a row.
      first: int32 [R], the row's first token; float32 [R], its log-probability.
      stopped: bool [R], by the first token already.
      ignored: bool [R], fills the batch up, is stopped and writes nothing.
    """

    prompts: kv.KVCache
    prompt: jax.Array
    lengths: jax.Array
    random: jax.Array
    first: tuple[jax.Array, jax.Array]
    stopped: jax.Array
    ignored: jax.Array


class Seats(NamedTuple):
    """Each seat's row and how far it is. [S], and [S, N] what it has written.

    Attributes:
      row: int32, of the queue.
      length: int32, of its prompt.
      random: float32 [S, N, 2], the row's.
      step: int32, tokens chosen so far.
      last: int32, the newest of them.
      done: bool.
      bad: bool, the logits were not finite.
      written: Completion [S, N].
    """

    row: jax.Array
    length: jax.Array
    random: jax.Array
    step: jax.Array
    last: jax.Array
    done: jax.Array
    bad: jax.Array
    written: Completion


class _State(NamedTuple):
    """The carry. `results` [R, N] and `bad` [R] have the rows that left their seat."""

    seats: Seats
    cache: kv.KVCache
    time: jax.Array  # int32 [], steps so far
    waiting: jax.Array  # int32 [], the next row of the queue
    results: Completion
    bad: jax.Array


def decode(
    queue: Queue,
    step: Step,
    choose: Choose,
    *,
    seats: int,
    max_new_tokens: int,
    shrink: bool = True,
    grow: bool = False,
) -> tuple[Completion, jax.Array]:
    """Continues every row of the queue until it stops or has max_new_tokens.

    A row's tokens depend on its prompt and key only, not on its seat or its time.

    Args:
      queue: R rows.
      step: the model.
      choose: the sampler.
      seats: S, rows decoded at once, at most R.
      max_new_tokens: N.
      shrink: go on with fewer seats when few are taken; moves rows between seats.
      grow: add slots to the cache as they are needed. Each number of slots is a loop of
        its own to compile.

    Returns: Completion [R, N], and bool [R]: the logits were not finite.
    """
    rows = len(queue.prompt)
    state = _State(
        _take_seats(queue, seats, max_new_tokens),
        _rows_of(queue, seats),
        jnp.int32(0),
        jnp.int32(seats),
        _nothing(rows, max_new_tokens),
        jnp.zeros(rows, bool),
    )
    width = kv.slots(queue.prompts)

    def body(state: _State) -> _State:
        # The slots behind the prompts are a ring: no row outlives one turn of it.
        slot = width + state.time % max_new_tokens
        old = state.seats
        position = jnp.where(old.done, kv.NEVER, old.length + old.step - 1)
        logits, cache = step(old.last, position, state.cache._replace(next=slot))
        new = _append(old, logits, choose)
        state = state._replace(seats=new, cache=cache, time=state.time + 1)
        return _refill(state, queue) if rows > seats else state

    if rows > seats:
        state = _refill(state, queue)
    in_order = rows == seats
    for part in _parts(seats, max_new_tokens, shrink, grow):
        if part.seats < len(state.seats.row):
            state, in_order = _shrink(state, part.seats), False
        cache = kv.lengthen(state.cache, width + part.slots - kv.slots(state.cache))

        def busy(state: _State, part=part) -> jax.Array:
            free = (part.slots == max_new_tokens) | (state.time < part.slots)
            taken = jnp.sum(~state.seats.done)
            return free & ((taken > part.fewer) | (state.waiting < rows))

        state = jax.lax.while_loop(busy, body, state._replace(cache=cache))
    return (state.seats.written, state.seats.bad) if in_order else _results(state)


class _Part(NamedTuple):
    """A part of the loop: over when no more than `fewer` seats are taken.

    Or when its slots are full, if they are fewer than the new tokens.
    """

    seats: int
    slots: int  # behind the prompts
    fewer: int


def _parts(seats: int, length: int, shrink: bool, grow: bool) -> list[_Part]:
    """More and more slots, all seats; then a quarter of the seats, and so on."""
    sizes = [seats]
    while shrink and sizes[-1] // _SHRINK >= _MIN_SEATS:
        sizes.append(sizes[-1] // _SHRINK)
    fewer = [*sizes[1:], 0]
    slots = sorted({max(1, length // share) for share in _GROW}) if grow else []
    growing = [_Part(seats, n, fewer[0]) for n in slots]
    return growing + [_Part(n, length, m) for n, m in zip(sizes, fewer, strict=True)]


def _nothing(rows: int, length: int) -> Completion:
    shape = (rows, length)
    return Completion(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
    )


def _rows_of(queue: Queue, seats: int) -> kv.KVCache:
    """The prompts of the first rows."""
    rows, prompts = len(queue.prompt), len(queue.prompts.positions)
    if rows == seats:  # repeated, not gathered, so that no row leaves its device
        return kv.repeat_rows(queue.prompts, rows // prompts)
    return kv.take_rows(queue.prompts, queue.prompt[:seats])


def _take_seats(queue: Queue, seats: int, length: int) -> Seats:
    """The first rows of the queue on the seats, each with its first token."""
    token, logp = (x[:seats] for x in queue.first)
    bad = jnp.isnan(logp)
    empty = _nothing(seats, length)
    return Seats(
        row=jnp.arange(seats, dtype=jnp.int32),
        length=queue.lengths[:seats],
        random=queue.random[:seats],
        step=jnp.ones(seats, jnp.int32),
        last=token,
        done=queue.stopped[:seats] | bad | (length == 1),
        bad=bad,
        written=_note(empty, 0, token, logp, ~queue.ignored[:seats]),
    )


def _note(written: Completion, step, tokens, logps, going) -> Completion:
    """Writes [S] down at places `step` of [S, N], where a row is going."""
    places = jax.lax.broadcasted_iota(jnp.int32, written.tokens.shape, 1)
    at = (places == jnp.atleast_1d(step)[:, None]) & going[:, None]
    return Completion(
        jnp.where(at, tokens[:, None], written.tokens),
        jnp.where(at, logps[:, None], written.logps),
        at | written.mask,
    )


def _append(seats: Seats, logits: jax.Array, choose: Choose) -> Seats:
    """Chooses a token for each seat that is not done, and writes it down."""
    step = jnp.minimum(seats.step, seats.random.shape[1] - 1)[:, None, None]
    random = jnp.take_along_axis(seats.random, step, axis=1)[:, 0]
    tokens, logps, stops = choose(logits, random)
    going = ~seats.done
    step = seats.step + going
    bad = going & jnp.isnan(logps)
    full = step == seats.written.tokens.shape[1]
    return seats._replace(
        step=step,
        last=tokens,
        done=seats.done | stops | bad | full,
        bad=seats.bad | bad,
        written=_note(seats.written, seats.step, tokens, logps, going),
    )


def _refill(state: _State, queue: Queue) -> _State:
    """Rows that are done leave their seats to the next ones, one at a time."""
    rows, length = state.results.tokens.shape

    def more(state: _State) -> jax.Array:
        return jnp.any(state.seats.done) & (state.waiting < rows)

    def change(state: _State) -> _State:
        seat, row = jnp.argmax(state.seats.done), state.waiting
        left = state.seats.row[seat]
        results = jax.tree.map(
            lambda all_rows, x: all_rows.at[left].set(x[seat]),
            state.results,
            state.seats.written,
        )
        one = jax.tree.map(lambda x: x[row][None], queue._replace(prompts=()))
        new = _take_seats(one, 1, length)._replace(row=row[None])
        seats = jax.tree.map(lambda x, y: x.at[seat].set(y[0]), state.seats, new)
        return state._replace(
            seats=seats,
            cache=kv.copy_row(state.cache, seat, queue.prompts, queue.prompt[row]),
            waiting=row + 1,
            results=results,
            bad=state.bad.at[left].set(state.seats.bad[seat]),
        )

    return jax.lax.while_loop(more, change, state)


def _shrink(state: _State, size: int) -> _State:
    """The rows that are not done on fewer seats; the others are among the results."""
    results, bad = _results(state)
    keep = jnp.argsort(state.seats.done, stable=True)[:size]
    return state._replace(
        seats=jax.tree.map(lambda x: x[keep], state.seats),
        cache=kv.take_rows(state.cache, keep),
        results=results,
        bad=bad,
    )


def _results(state: _State) -> tuple[Completion, jax.Array]:
    """What all rows have written, those on their seats too."""
    row = state.seats.row
    results = jax.tree.map(
        lambda all_rows, x: all_rows.at[row].set(x), state.results, state.seats.written
    )
    return results, state.bad.at[row].set(state.seats.bad)
