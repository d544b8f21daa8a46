"""Independent checks: float64 NumPy formulas and their central differences."""

import jax
import jax.numpy as jnp
import numpy as np


def numeric_gradient(function, arrays, argnum, weights, step=1e-5):
    """Gradient of Σ weights * function(*arrays) w.r.t. one array, in float64."""
    arrays = [np.array(x, np.float64) for x in arrays]
    x = arrays[argnum]
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        center = x[i]
        x[i] = center + step
        up = np.sum(weights * function(*arrays))
        x[i] = center - step
        down = np.sum(weights * function(*arrays))
        x[i] = center
        grad[i] = (up - down) / (2 * step)
    return grad


def assert_matches(function, oracle, arrays, argnums, *, rtol=1e-5, atol=1e-6):
    """function (float32, jax) has the value and the gradients of oracle (float64).

    Arguments that are not in argnums must have a gradient of exactly 0.
    """
    arrays = [np.asarray(x, np.float32) for x in arrays]
    want = oracle(*[x.astype(np.float64) for x in arrays])
    function = jax.jit(function)
    got = function(*arrays)
    assert got.dtype == jnp.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    weights = np.cos(np.arange(want.size, dtype=np.float64)).reshape(want.shape)
    cotangent = jnp.asarray(weights, jnp.float32)
    grads = jax.vjp(function, *map(jnp.asarray, arrays))[1](cotangent)
    for i, grad in enumerate(grads):
        if i in argnums:
            numeric = numeric_gradient(oracle, arrays, i, weights)
            assert np.any(numeric)
            np.testing.assert_allclose(grad, numeric, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(grad, np.zeros_like(arrays[i]))


def log_softmax(logits):
    """Float64, by subtracting the maximum."""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
