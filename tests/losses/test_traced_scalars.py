"""Every float scalar may be traced: a sweep over it is a vmap."""

import functools

import jax
import numpy as np
import pytest

from jalign import losses
from tests.losses.cases import CASES, make_arrays


def floats(case):
    return {k: v for k, v in case.scalars.items() if isinstance(v, float)}


NAMES = sorted(name for name, case in CASES.items() if floats(case))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_the_scalars_is_a_loop(name):
    case = CASES[name]
    arrays = make_arrays(case)
    rest = {k: v for k, v in case.scalars.items() if k not in floats(case)}
    function = functools.partial(getattr(losses, name), *arrays, **rest)
    swept = {k: np.float32([v, 0.9 * v]) for k, v in floats(case).items()}
    got = jax.jit(jax.vmap(lambda scalars: function(**scalars)))(swept)
    for i in range(2):
        want = function(**{k: float(v[i]) for k, v in swept.items()})
        one = jax.tree.map(lambda x, i=i: x[i], got)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, one, want)
