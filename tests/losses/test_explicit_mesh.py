"""Every loss, and its gradient, on a mesh whose shardings are part of the types."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.losses.case import SIZES
from tests.losses.cases import CASES, call, make_arrays
from tests.tolerance import float32_sum

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
ROUNDING = float32_sum(SIZES["B"] * SIZES["T"])


def spread(case):
    """The arrays of a case, each with its batch over the eight devices."""
    arrays = []
    for axes, x in zip(case.args.values(), make_arrays(case), strict=True):
        spec = PartitionSpec("data" if "B" in axes else None)
        arrays.append(jax.device_put(x, NamedSharding(MESH, spec)) if axes else x)
    return arrays


@pytest.mark.parametrize("name", sorted(CASES))
def test_is_accepted_with_its_gradient(name):
    case = CASES[name]

    def total(*arrays):
        return sum(leaf.sum() for leaf in jax.tree.leaves(call(name, *arrays)))

    differentiable = [list(case.args).index(arg) for arg in case.grads]
    with jax.set_mesh(MESH):
        arrays = spread(case)
        jax.eval_shape(functools.partial(call, name), *arrays)
        if differentiable:
            jax.eval_shape(jax.grad(total, differentiable), *arrays)


def test_groups_over_devices_are_those_of_one():
    names = [name for name, case in CASES.items() if "group_ids" in case.args]
    assert len(names) > 3
    for name in names:
        want = call(name, *make_arrays(CASES[name]))
        with jax.set_mesh(MESH):
            got = jax.jit(functools.partial(call, name))(*spread(CASES[name]))
        np.testing.assert_allclose(got, want, rtol=ROUNDING, atol=ROUNDING)
