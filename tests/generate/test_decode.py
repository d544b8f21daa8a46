"""The loop alone: a model that counts down to 0, the stop token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import generate
from jalign.generate.decode import decode, fresh_rows
from jalign.models import cache as kv
from tests.generate.doubles import HistoryModel

WIDTH, LIMIT = 3, 8
STARTS = np.array([2, 7, 0, 9, 1, 1, 4, 20, 3, 0, 6, 2, 5, 5, 1, 8, 0, 0, 3, 2])


def count_down(calls, tokens, positions, cache):
    """Logits for the number before; notes who was at work, and what they could see."""
    seen = (cache.positions <= positions[:, None]) & (positions < kv.NEVER)[:, None]
    jax.debug.callback(lambda *x: calls.append(x), tokens, positions, seen)
    cache = kv.advance(cache, positions[:, None])
    return jax.nn.one_hot(tokens - 1, 32), cache


def choose(logits, random):
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, -tokens.astype(jnp.float32), tokens == 0


def run(**how):
    rows, calls = len(STARTS), []
    positions = jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32), (rows, WIDTH))
    k, v = jnp.zeros((1, rows, 1, 1, WIDTH)), jnp.zeros((1, rows, 1, WIDTH, 1))
    starts = jnp.int32(STARTS)
    cache = kv.KVCache(k, v, positions, jnp.int32(WIDTH))
    fresh = fresh_rows(
        jnp.full(rows, WIDTH, jnp.int32),
        jnp.zeros((rows, LIMIT, 2)),
        jnp.zeros(rows, bool),
    )
    step = functools.partial(count_down, calls)
    completion, bad = jax.jit(
        lambda rows, cache: decode(
            rows, jax.nn.one_hot(starts, 32), cache, step, choose, **how
        )
    )(fresh, cache)
    jax.effects_barrier()
    return jax.tree.map(np.asarray, completion), np.asarray(bad), calls


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("shrink", [True, False])
def test_every_row_counts_down_from_its_own_start(shrink, grow):
    completion, bad, calls = run(shrink=shrink, grow=grow)
    for row, start in enumerate(STARTS):
        want = np.arange(start, max(-1, start - LIMIT), -1)
        mask = np.arange(LIMIT) < len(want)
        np.testing.assert_array_equal(completion.mask[row], mask)
        np.testing.assert_array_equal(completion.tokens[row][mask], want)
        np.testing.assert_array_equal(completion.logps[row][mask], -want)
        assert not completion.tokens[row][~mask].any()
        assert not completion.logps[row][~mask].any()
    assert not bad.any()
    for tokens, positions, seen in calls:
        at_work = positions < kv.NEVER
        # A row sees its prompt and what it wrote itself, the newest token apart.
        np.testing.assert_array_equal(seen.sum(1)[at_work], positions[at_work])
        assert (tokens[at_work] > 0).all()


def lengths():
    return np.minimum(STARTS + 1, LIMIT)


def test_few_rows_do_not_pay_for_all():
    sizes = [len(tokens) for tokens, _, _ in run()[2]]
    left = [sum(lengths() - 1 > step) for step in range(LIMIT - 1)]
    assert sizes == [20 if n > 5 else 5 for n in left]
    assert {len(tokens) for tokens, _, _ in run(shrink=False)[2]} == {20}


def test_the_cache_grows_as_it_fills():
    slots = [seen.shape[1] - WIDTH for _, _, seen in run(grow=True)[2]]
    assert slots == [2, 2, 4, 4, 8, 8, 8]


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2], [3]]


def sample(**how):
    model = HistoryModel()
    how = dict(key=jax.random.key(3), max_new_tokens=12, stop_tokens=[1, 4]) | how
    prompts = how.pop("prompts", PROMPTS)
    params = model.init(jax.random.key(0))
    return generate.to_host(generate.generate(model, params, prompts, **how))


def test_a_group_is_its_prompt_repeated():
    want = sample(prompts=[prompt for prompt in PROMPTS for _ in range(3)])
    got = sample(group_size=3)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


def test_the_prompt_of_a_group_is_read_once():
    calls = []

    class Counting(HistoryModel):
        def apply(self, params, tokens, **how):
            jax.debug.callback(lambda: calls.append(tokens.shape))
            return super().apply(params, tokens, **how)

    model = Counting()
    params = model.init(jax.random.key(0))
    how = dict(key=jax.random.key(1), max_new_tokens=3, group_size=4)
    generate.generate(model, params, PROMPTS, **how).tokens.block_until_ready()
    jax.effects_barrier()
    assert calls == [(5, 16), (20, 1), (20, 1)]
