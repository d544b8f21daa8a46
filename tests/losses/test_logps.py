"""Tests for jalign/losses/logps.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.losses import (
    average_logps,
    entropy_from_logits,
    logps_from_logits,
    sequence_logps,
    token_logps,
)
from tests.losses.oracle import assert_matches, log_softmax

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 3, 4)).astype(np.float32)
UNEMBED = RNG.normal(size=(4, 6)).astype(np.float32)
TARGETS = RNG.integers(0, 6, size=(2, 3)).astype(np.int32)


def pick(log_p):
    return np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]


def entropy(log_p):
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


def test_from_logits_matches_float64_closed_form():
    logits = (3 * RNG.normal(size=(2, 3, 6))).astype(np.float32)
    assert_matches(
        lambda x: logps_from_logits(x, TARGETS),
        lambda x: pick(log_softmax(x)),
        [logits],
        argnums=(0,),
    )
    assert_matches(
        entropy_from_logits, lambda x: entropy(log_softmax(x)), [logits], argnums=(0,)
    )


def test_impossible_tokens_count_nothing():
    logits = np.float32([[1.0, 2.0, -np.inf, 0.5]])
    possible = logits[:, [0, 1, 3]]
    target = np.int32([1])
    for fn in (entropy_from_logits, lambda x: logps_from_logits(x, target)):
        value, grad = jax.value_and_grad(lambda x, fn=fn: fn(x).sum())(logits)
        np.testing.assert_allclose(value, fn(possible)[0], rtol=1e-6)
        assert np.all(np.isfinite(grad)) and grad[0, 2] == 0


@pytest.mark.parametrize(
    ("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.0)]
)
@pytest.mark.parametrize("chunk_size", [2, 1024])
def test_token_logps_match_float64_closed_form(chunk_size, temperature, softcap):
    def logits(h, w):
        z = h @ w if softcap is None else softcap * np.tanh(h @ w / softcap)
        return log_softmax(z / temperature)

    options = {
        "chunk_size": chunk_size,
        "temperature": temperature,
        "softcap": softcap,
    }
    for oracle, i in ((pick, 0), (entropy, 1)):
        assert_matches(
            lambda h, w, i=i: token_logps(
                h, w, TARGETS, return_entropy=True, **options
            )[i],
            lambda h, w, oracle=oracle: oracle(logits(h, w)),
            [HIDDEN, UNEMBED],
            argnums=(0, 1),
        )
    both = token_logps(HIDDEN, UNEMBED, TARGETS, return_entropy=True, **options)
    alone = token_logps(HIDDEN, UNEMBED, TARGETS, **options)
    np.testing.assert_array_equal(alone, both[0])


def test_temperature_may_be_traced_and_has_no_gradient():
    def total(t):
        return token_logps(HIDDEN, UNEMBED, TARGETS, temperature=t).sum()

    value, grad = jax.jit(jax.value_and_grad(total))(0.7)
    np.testing.assert_allclose(value, total(0.7), rtol=1e-6)
    assert grad == 0


def test_bfloat16_inputs_are_multiplied_as_such_and_summed_in_float32():
    h, w = jnp.bfloat16(HIDDEN), jnp.bfloat16(UNEMBED)

    def total(h, w):
        return token_logps(h, w, TARGETS, chunk_size=2).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(h, w)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    rounded = np.asarray(h, "f8"), np.asarray(w, "f8")
    want = pick(log_softmax(rounded[0] @ rounded[1])).sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    exact = jax.grad(total, (0, 1))(h.astype("f4"), w.astype("f4"))
    for got, want in zip(grads, exact, strict=True):
        np.testing.assert_allclose(got.astype("f4"), want, rtol=0.02, atol=0.02)


def test_unembed_gradient_does_not_stall_in_bfloat16():
    # 4,096 equal contributions: a bfloat16 sum of ones stops growing at 256.
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    targets = np.zeros((1, 4096), np.int32)
    grad = jax.grad(lambda w: token_logps(hidden, w, targets, chunk_size=8).sum())(
        jnp.zeros((1, 2), jnp.bfloat16)
    )
    np.testing.assert_array_equal(grad.astype("f4"), [[2048.0, -2048.0]])


def test_a_long_sum_stays_within_a_thousandth_of_a_nat():
    logits = (4 * RNG.normal(size=(1, 512, 2000))).astype(np.float32)
    targets = RNG.integers(0, 2000, size=(1, 512)).astype(np.int32)
    got = sequence_logps(logps_from_logits(logits, targets), np.ones((1, 512), bool))
    log_p = log_softmax(logits.astype("f8"))
    want = np.take_along_axis(log_p, targets[..., None], -1).sum()
    assert abs(got[0] - want) < 1e-3


@pytest.mark.parametrize("garbage", [-100, -1, 6, 2**31 - 1])
def test_a_masked_target_outside_the_vocabulary_does_no_harm(garbage):
    targets, mask = TARGETS.copy(), np.ones((2, 3), bool)
    targets[1, 2], mask[1, 2] = garbage, False

    def total(h, w, targets):
        return sequence_logps(token_logps(h, w, targets), mask).sum()

    got = jax.value_and_grad(total, (0, 1))(HIDDEN, UNEMBED, targets)
    want = jax.value_and_grad(total, (0, 1))(HIDDEN, UNEMBED, TARGETS)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sequence_logps_sum_the_counted_tokens():
    logps = np.float32([[-1, -2, np.nan], [-np.inf, -4, -8], [np.nan] * 3])
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    value, grad = jax.value_and_grad(lambda x: sequence_logps(x, mask).sum())(logps)
    assert value == -15
    np.testing.assert_array_equal(sequence_logps(logps, mask), [-3, -12, 0])
    np.testing.assert_array_equal(grad, mask.astype("f4"))


def test_average_logps_divide_by_the_number_of_counted_tokens():
    logps = np.float32([[-1, -2, np.nan], [-np.inf, -4, -8], [np.nan] * 3])
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(average_logps(logps, mask), [-1.5, -6, 0])
    grad = jax.grad(lambda x: average_logps(x, mask).sum())(logps)
    np.testing.assert_array_equal(grad, mask / np.float32(2))


def test_an_average_refuses_a_mask_that_is_no_array_of_tokens():
    with pytest.raises(AssertionError):
        average_logps(np.zeros((2, 3), np.float32), np.asarray(True))
