"""Tests for jalign/losses/dpo.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jalign.losses import dpo_loss, implicit_rewards
from jalign.train.loss_table import REGISTRY
from tests.losses.oracle import assert_matches

# One column a pair: π = π_ref, an ordinary one, one whose naive exp overflows.
LOGPS = np.array([[-9, -4, -800], [-7, -30, -1], [-9, -5, -2], [-7, -20, -1]], "f4")


@pytest.mark.parametrize("fn", [dpo_loss, jax.jit(dpo_loss)], ids=["eager", "jit"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_value_and_gradient_match_float64_closed_form(fn, eps):
    c, r, ref_c, ref_r = LOGPS.astype("f8")
    z = 0.5 * ((c - ref_c) - (r - ref_r))  # 0, 5.5, -399
    want = (1 - eps) * np.logaddexp(0, -z) + eps * np.logaddexp(0, z)

    def loss(*logps):
        return fn(*logps, beta=0.5, label_smoothing=eps)

    assert_allclose(loss(*LOGPS), want, rtol=1e-5)
    grads = jax.grad(lambda *logps: loss(*logps).sum(), argnums=(0, 1, 2, 3))(*LOGPS)
    g = 0.5 * (1 / (1 + np.exp(-z)) - (1 - eps))
    assert_allclose(grads, [g, -g, 0 * g, 0 * g], rtol=1e-5, atol=1e-7)


def test_loss_is_log_2_at_the_reference():
    assert_allclose(dpo_loss(*LOGPS[[0, 1, 0, 1]], beta=0.1), np.log(2), rtol=1e-6)


def test_close_policies_are_told_apart_under_large_sums():
    # Ratios first: the margin 0.01 survives beside sums of thousands of nats.
    ref = np.float32([-3000.0]), np.float32([-2000.0])
    chosen, rejected = ref[0] + np.float32(0.0078125), ref[1]
    z = 1.0 * 0.0078125
    loss = dpo_loss(chosen, rejected, *ref, beta=1.0)
    assert_allclose(loss, np.logaddexp(0, -z), rtol=1e-6)


def test_implicit_rewards_are_scaled_log_ratios_without_gradient():
    assert_matches(
        lambda a, b: implicit_rewards(a, b, beta=0.3),
        lambda a, b: 0.3 * (a - b),
        LOGPS[:2],
        argnums=(),
    )


BAD = [LOGPS[..., None], LOGPS.astype("f2"), [*LOGPS[:3], LOGPS[3, :1]]]


@pytest.mark.parametrize("bad", BAD, ids=["rank", "dtype", "broadcasts"])
def test_rejects_anything_but_four_equal_float32_vectors(bad):
    with pytest.raises(AssertionError):
        dpo_loss(*bad, beta=0.1)


OF_PAIRS = {
    e.function.__name__: e.function
    for e in REGISTRY["dpo"].values()
    if len(e.inputs) == 4
}


@pytest.mark.parametrize("loss", OF_PAIRS.values(), ids=OF_PAIRS)
def test_the_help_of_a_loss_of_pairs_is_complete(loss):
    """`paired` writes what all of them share, and keeps what is the formula's own."""
    parameters = list(inspect.signature(loss).parameters)
    assert parameters[:5] == [
        "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
        "beta",
    ]  # fmt: skip
    text = inspect.getdoc(loss)
    parts = ["Args:", *parameters[:2], "ref_chosen_logps, ref_rejected_logps", "beta:"]
    parts += ["Returns:", "Raises:", "Source:"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    by_name = dict(zip(parameters, (*[jnp.zeros(2)] * 4, 0.1), strict=False))
    assert loss(**by_name, **{n: 0.1 for n in parameters[5:]}).shape == (2,)
