"""Pairs of completions, and what the oracles of preference losses share."""

import jax.numpy as jnp
import numpy as np

from tests.losses.oracle import assert_matches

# A column a pair: π = π_ref, won, lost, both up, both down, one whose naive exp
# overflows. Rows: chosen, rejected, the same under π_ref.
LOGPS = np.array(
    [
        [-9.0, -4.25, -8.5, -3.0, -12.0, -800.0],
        [-7.0, -30.5, -2.0, -6.0, -11.0, -1.0],
        [-9.0, -5.0, -6.0, -5.5, -7.0, -2.0],
        [-7.0, -21.0, -5.0, -7.5, -9.5, -4.0],
    ],
    np.float32,
)
SIDES, BETA, EPS = (0, 1), 0.3, 0.1


def log_sigmoid(x):
    """Float64, without overflow."""
    return -np.logaddexp(0.0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def logistic(z, eps=0.0):
    return -(1 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z)


def assert_all_match(cases, arrays, argnums=SIDES, **tolerances):
    """Each (function, oracle) by value and gradient, all in one compilation."""
    functions, oracles = zip(*cases, strict=True)
    assert_matches(
        lambda *x: jnp.stack([f(*x) for f in functions]),
        lambda *x: np.stack([f(*x) for f in oracles]),
        arrays,
        argnums,
        **tolerances,
    )
