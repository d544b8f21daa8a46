import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.generate import sampling
from tests.tolerance import float32_sum

V = 7
ROUNDING = float32_sum(V, 10.0)  # logits of at most about 10


@pytest.fixture
def logits(key):
    return 3.0 * jax.random.normal(key, (5, V))


def random_for(key, rows):
    return sampling.uniforms(jax.random.split(key, rows))


def test_greedy_is_argmax_with_its_log_probability(logits):
    tokens, logps = sampling.greedy(logits)
    x = np.asarray(logits, np.float64)
    expected = x.max(-1) - np.log(np.exp(x).sum(-1))
    np.testing.assert_array_equal(tokens, x.argmax(-1))
    np.testing.assert_allclose(logps, expected, atol=ROUNDING)
    assert tokens.dtype == jnp.int32 and logps.dtype == jnp.float32


def test_greedy_ties_go_to_the_lowest_id():
    tokens, _ = sampling.greedy(jnp.array([[0.0, 2.0, 2.0]]))
    assert tokens.tolist() == [1]


def test_sample_logps_are_of_the_scaled_distribution(logits, key):
    tokens, logps = sampling.sample(logits, random_for(key, 5), temperature=0.5)
    x = np.asarray(logits, np.float64) / 0.5
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(logps, expected[range(5), tokens], atol=1e-5)


def test_sample_frequencies_follow_the_softmax(key):
    logits = jnp.array([[0.0, 1.0, 2.0]])
    n = 20_000
    tokens, _ = sampling.sample(
        jnp.tile(logits, (n, 1)), random_for(key, n), temperature=2.0
    )
    share = np.bincount(np.asarray(tokens), minlength=3) / n
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0] / 2.0), atol=0.015)


def test_filters_that_are_off_keep_everything(key):
    n = 20_000
    logits = jnp.tile(jnp.array([[0.0, 1.0, 2.0, -4.0]]), (n, 1))
    tokens, _ = sampling.sample_filtered(logits, random_for(key, n))
    share = np.bincount(np.asarray(tokens), minlength=4) / n
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0]), atol=0.015)
    assert share[3] > 0


@pytest.mark.parametrize("how", [dict(top_k=1), dict(top_p=1e-9)])
def test_the_tightest_filter_is_greedy(how, logits, key):
    tied = logits.at[0].set(1.0)  # a tie, too
    tokens, logps = sampling.sample_filtered(tied, random_for(key, 5), **how)
    expected = sampling.greedy(tied)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(logps, expected[1], atol=ROUNDING)


def seen(key, probs, n=2000, **how):
    """The tokens that come up in n draws."""
    logits = jnp.tile(jnp.log(jnp.array([probs])), (n, 1))
    tokens, logps = sampling.sample_filtered(logits, random_for(key, n), **how)
    unfiltered = np.log(np.asarray(probs))[np.asarray(tokens)]
    np.testing.assert_allclose(logps, unfiltered, atol=1e-5)
    return set(np.asarray(tokens).tolist())


def test_what_the_filters_keep(key):
    probs = [0.1, 0.4, 0.3, 0.2]
    assert seen(key, probs, top_k=2) == {1, 2}
    assert seen(key, probs, top_k=9) == {0, 1, 2, 3}
    assert seen(key, probs, top_p=0.39) == {1}
    assert seen(key, probs, top_p=0.41) == {1, 2}
    assert seen(key, probs, top_p=0.95) == {0, 1, 2, 3}
    # top-p works on what top-k left: 0.4 / 0.7 is already more than a half.
    assert seen(key, probs, top_k=2, top_p=0.5) == {1}
    assert seen(key, [0.25] * 4, top_k=3) == {0, 1, 2}


def test_settings_may_be_traced_and_jit_changes_nothing(logits, key):
    how = dict(temperature=0.8, top_k=3, top_p=0.9)
    random = random_for(key, 5)
    eager = sampling.sample_filtered(logits, random, **how)
    traced = jax.jit(sampling.sample_filtered)(logits, random, **how)
    np.testing.assert_array_equal(eager[0], traced[0])
    np.testing.assert_allclose(eager[1], traced[1], atol=ROUNDING)


def test_a_row_depends_on_its_own_numbers_only(logits, key):
    random = random_for(key, 5)
    order = jnp.array([3, 0, 4, 1, 2])
    for sampler in (sampling.sample, sampling.sample_filtered):
        tokens, _ = sampler(logits, random)
        moved, _ = sampler(logits[order], random[order])
        np.testing.assert_array_equal(tokens[order], moved)


@pytest.mark.parametrize("how", [{}, dict(top_k=2, top_p=0.9)])
def test_impossible_tokens_never_come_and_extremes_stay_finite(how, key):
    logits = jnp.array([[-jnp.inf, 1e30, -1e30], [-jnp.inf, -1e4, 1e4]])
    sampler = sampling.sample_filtered if how else sampling.sample
    tokens, logps = sampler(logits, random_for(key, 2), **how)
    assert tokens.tolist() == [1, 2]
    np.testing.assert_allclose(logps, 0.0)


def test_nan_logits_give_nan_logps(key):
    logits = jnp.array([[0.0, jnp.nan], [0.0, 1.0]])
    _, logps = sampling.sample(logits, random_for(key, 2))
    assert np.isnan(logps[0]) and np.isfinite(logps[1])
