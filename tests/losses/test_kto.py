"""Tests for jalign/losses/kto.py."""

import jax
import numpy as np

from jalign.losses import kto_kl, kto_loss
from tests.losses.oracle import assert_matches
from tests.losses.pairs import BETA, LOGPS, sigmoid

ROWS = LOGPS[[0, 2]]
DESIRABLE = np.array([1, 1, 0, 0, 1, 0], bool)


def oracle(logps, ref_logps, kl=0.0, good=1.0, bad=1.0):
    ratio = logps - ref_logps
    gain = 1 - sigmoid(BETA * (ratio - kl))
    loss = 1 - sigmoid(BETA * (kl - ratio))
    return np.where(DESIRABLE, good * gain, bad * loss)


def test_matches_float64_closed_form():
    options = {"kl": 1.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    assert_matches(
        lambda a, b: kto_loss(a, b, DESIRABLE, beta=BETA, **options),
        lambda a, b: oracle(a, b, 1.5, 1.3, 0.7),
        ROWS,
        argnums=(0,),
    )
    plain = kto_loss(*ROWS, DESIRABLE, beta=BETA, kl=0.0)
    np.testing.assert_allclose(plain, oracle(*ROWS.astype("f8")), rtol=1e-5)


def test_kl_is_the_mean_of_the_counted_rows_and_never_below_0():
    mask = np.array([1, 1, 0, 1, 0, 0], bool)
    up = np.where(mask, ROWS[0] + 3, np.nan)
    want = (up[mask] - ROWS[1][mask]).astype("f8").mean()
    np.testing.assert_allclose(kto_kl(up, ROWS[1], mask), want, rtol=1e-6)
    assert kto_kl(*ROWS, np.ones(6, bool)) == 0  # the mean is far below 0
    assert kto_kl(*ROWS, np.zeros(6, bool)) == 0


def test_no_gradient_flows_through_the_kl():
    mask = np.ones(6, bool)

    def total(logps, kl):
        return kto_loss(logps, ROWS[1], DESIRABLE, beta=BETA, kl=kl).sum()

    assert jax.grad(total, 1)(ROWS[0], 1.5) == 0
    assert not np.any(jax.grad(lambda x: kto_kl(x, ROWS[1], mask))(ROWS[0] + 1e3))


def test_kl_of_the_global_batch_is_not_the_mean_of_the_parts():
    """TRL takes the mean of each micro-batch, then clips: both numbers."""
    ratio, mask = np.float32([4.0, 2.0, -5.0, -1.0]), np.ones(4, bool)
    zero = np.zeros(4, np.float32)
    assert kto_kl(ratio, zero, mask) == 0.0
    parts = [kto_kl(ratio[h], zero[h], mask[h]) for h in (slice(2), slice(2, 4))]
    assert np.mean(parts) == 1.5
