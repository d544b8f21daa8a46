"""Tests for jalign/models/platform.py: every row computes what PLAIN does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import Model
from jalign.models.platform import CPU, GPU, PLAIN, TPU, platform_of
from tests.models.tiny import (
    CONFIGS,
    FAMILY_CONFIGS,
    random_params,
    random_tokens,
)


@pytest.mark.parametrize(
    "row", [CPU, GPU, TPU._replace(interpret=True)], ids=["cpu", "gpu", "tpu"]
)
def test_every_row_computes_what_plain_does(row):
    plain = Model(CONFIGS["qwen2"], platform=PLAIN)
    params, tokens = random_params(plain), random_tokens((2, 9))
    want, _ = plain.apply(params, tokens)
    model = plain.replace(platform=row)
    got, _ = model.apply(params, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)
    cache = model.init_cache(2, 9)
    _, cache = model.apply(params, tokens[:, :8], cache=cache)
    at = jnp.full((2, 1), 8)
    last, _ = model.apply(params, tokens[:, 8:], positions=at, cache=cache)
    np.testing.assert_allclose(last[:, 0], want[:, 8], atol=2e-5)


def test_kernels_cast_in_the_loop_are_tied_to_their_layer():
    model = Model(FAMILY_CONFIGS["mixtral"], platform=PLAIN, dtype=jnp.bfloat16)
    params, tokens = random_params(model), random_tokens((2, 9))

    def casts_and_gradients(platform):
        def total(params):
            return jnp.sum(model.replace(platform=platform).apply(params, tokens)[0])

        [loop] = [
            equation.params["jaxpr"].jaxpr
            for equation in jax.make_jaxpr(total)(params).jaxpr.eqns
            if equation.primitive.name == "scan"
        ]
        of_all = [
            equation.invars[0]
            for equation in loop.eqns
            if equation.primitive.name == "convert_element_type"
            and equation.invars[0] in loop.invars
            and equation.outvars[0].aval.dtype == jnp.bfloat16
            and equation.outvars[0].aval.ndim > 1
        ]
        return len(of_all), jax.jit(jax.grad(total))(params)

    before, want = casts_and_gradients(PLAIN)
    after, got = casts_and_gradients(PLAIN._replace(casts_in_loop=True))
    assert before == 8 and after == 1  # the router's, which is small
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_plain_has_forward_mode():
    model = Model(CONFIGS["llama"], platform=PLAIN)
    params, along = random_params(model), random_params(model, seed=1)
    tokens = random_tokens((1, 80))  # longer than what is plain on a CPU too

    def total(params):
        return jnp.sum(model.apply(params, tokens)[0])

    value, moved = jax.jit(lambda p, d: jax.jvp(total, (p,), (d,)))(params, along)
    grads = jax.jit(jax.grad(total))(params)
    want = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(along)))
    np.testing.assert_allclose(moved, want, rtol=1e-4)
    np.testing.assert_allclose(value, total(params), rtol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(
            lambda p: model.replace(platform=CPU).apply(p, tokens)[0],
            (params,),
            (along,),
        )


def test_a_model_runs_on_its_devices_row_unless_it_is_told():
    assert platform_of(None) is CPU and Model(CONFIGS["llama"]).runs_on is CPU
    assert Model(CONFIGS["llama"], platform=GPU).runs_on is GPU
    assert Model(CONFIGS["llama"], attention="plain").runs_on.einsum is jnp.einsum
