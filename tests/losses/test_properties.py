"""What holds for every function in losses: one test a property, over all of CASES."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jalign import losses
from tests.losses.case import BOOLS, INTEGERS, SIZES
from tests.losses.cases import CASES, call, make_arrays, make_mask
from tests.tolerance import float32_sum

# Nothing sums more than all logits, or terms of more than about 1.
ROUNDING = float32_sum(SIZES["B"] * SIZES["T"] * SIZES["V"])
every = pytest.mark.parametrize("name", sorted(CASES))


def total(name, mask, *arrays):
    """(A weighted sum of the counted outputs, so that each has its own cotangent; the
    outputs)."""
    outputs = call(name, *arrays)
    leaves = jax.tree.leaves(outputs)
    sums = []
    for leaf in leaves:
        index = np.indices(leaf.shape).sum(0) if leaf.shape else np.zeros(())
        weights = jnp.asarray(np.cos(index), jnp.float32)
        counted = mask.any(1) if mask.ndim > leaf.ndim > 0 else mask
        kept = jnp.where(counted, leaf, 0.0) if leaf.shape else leaf
        sums.append(jnp.sum(weights * kept))
    return sum(sums), outputs


def float_args(name):
    not_floats = {*BOOLS, *INTEGERS}
    return [i for i, a in enumerate(CASES[name].args) if a not in not_floats]


@functools.cache
def compiled(name):
    """(mask, *arrays) -> (total, outputs), gradients; kept, for it compiles slowly."""
    function = functools.partial(total, name)
    if not float_args(name):
        return jax.jit(lambda *args: (function(*args), ()))
    which = [i + 1 for i in float_args(name)]
    return jax.jit(jax.value_and_grad(function, which, has_aux=True))


def value_and_grads(name, mask, arrays):
    (value, _), grads = compiled(name)(mask, *arrays)
    return value, grads


def assert_trees(check, got, want):
    jax.tree.map(check, got, want)


def close(rtol=1e-5, atol=1e-5):
    return functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)


def test_every_public_function_has_a_case():
    assert set(CASES) == set(losses.__all__)
    assert list(losses.__all__) == sorted(losses.__all__)


@every
def test_docstring_names_what_comes_out_and_what_raises(name):
    doc = getattr(losses, name).__doc__
    assert "Returns:" in doc and "Raises:" in doc and "Args:" in doc


@every
def test_numpy_jax_and_jit_agree_in_float32(name):
    arrays = make_arrays(CASES[name])
    eager = call(name, *arrays)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(eager))
    mask, *arrays = map(jnp.asarray, (make_mask(CASES[name]), *arrays))
    (_, jitted), _ = compiled(name)(mask, *arrays)
    assert_trees(close(ROUNDING, ROUNDING), jitted, eager)


@every
def test_vmap_is_a_loop(name):
    arrays = make_arrays(CASES[name])
    stacked = [
        np.stack([x, x[::-1] if x.ndim and x.shape[0] == 8 else x]) for x in arrays
    ]
    got = jax.jit(jax.vmap(functools.partial(call, name)))(*stacked)
    second = call(name, *[x[1] for x in stacked])
    assert_trees(close(), jax.tree.map(lambda x: x[1], got), second)


@every
def test_gradients_flow_where_they_should_and_are_exactly_zero_elsewhere(name):
    case = CASES[name]
    _, grads = value_and_grads(name, make_mask(case), make_arrays(case))
    names = [list(case.args)[i] for i in float_args(name)]
    for arg, grad in zip(names, grads, strict=True):
        assert np.all(np.isfinite(grad)), arg
        assert np.any(grad) == (arg in case.grads), arg


@pytest.mark.parametrize("name", [name for name in sorted(CASES) if float_args(name)])
def test_forward_mode_agrees_with_reverse_mode(name):
    mask, arrays, which = (
        make_mask(CASES[name]),
        make_arrays(CASES[name]),
        float_args(name),
    )
    rng = np.random.default_rng(3)
    along = [np.float32(rng.normal(size=arrays[i].shape)) for i in which]

    def of(*floats):
        args = dict(enumerate(arrays)) | dict(zip(which, floats, strict=True))
        return total(name, mask, *args.values())[0]

    floats = tuple(arrays[i] for i in which)
    moved = jax.jit(lambda *v: jax.jvp(of, floats, v)[1])(*along)
    _, grads = value_and_grads(name, mask, arrays)
    want = sum(np.vdot(v, g) for v, g in zip(along, grads, strict=True))
    sizes = [
        np.linalg.norm(np.concatenate([np.ravel(x) for x in xs]))
        for xs in (along, grads)
    ]
    np.testing.assert_allclose(moved, want, rtol=0, atol=1e-5 * np.prod(sizes))


@every
def test_what_lies_at_masked_places_changes_nothing(name):
    case = CASES[name]
    mask, arrays = make_mask(case), make_arrays(case)
    dirty = []
    for arg, axes, x in zip(case.args, case.args.values(), arrays, strict=True):
        if "B" in axes and not arg.endswith("mask"):
            x = x.copy()
            rows = mask.any(1) if mask.ndim == 2 and "T" not in axes else mask
            dirt = {"b": True, "i": -100, "f": case.pad}
            x[~rows] = dirt[x.dtype.kind]
        dirty.append(x)
    got = value_and_grads(name, mask, dirty)
    assert_trees(close(ROUNDING, ROUNDING), got, value_and_grads(name, mask, arrays))


@every
def test_padding_changes_nothing(name):
    case = CASES[name]
    mask, arrays = make_mask(case), make_arrays(case)
    extra = {"B": 3, "T": 2}

    def padded(x, axes, value):
        pads = [(0, extra.get(a, 0)) for a in axes]
        return np.pad(x, pads, constant_values=value) if pads else x

    long_mask = padded(mask, "BT"[: mask.ndim], False)
    longer = []
    for axes, x in zip(case.args.values(), arrays, strict=True):
        fill = {"b": False, "i": -100, "f": case.pad}[x.dtype.kind]
        longer.append(padded(x, axes, fill))
    value, grads = value_and_grads(name, mask, arrays)
    long_value, long_grads = value_and_grads(name, long_mask, longer)
    close(ROUNDING, ROUNDING)(long_value, value)
    for i, grad, long_grad in zip(float_args(name), grads, long_grads, strict=True):
        axes = list(case.args.values())[i]
        # The padding's own gradient is exactly 0, even where it holds NaN.
        close(ROUNDING, ROUNDING)(long_grad, padded(np.asarray(grad), axes, 0.0))


@every
def test_order_of_the_batch_does_not_matter(name):
    case = CASES[name]
    arrays, order = make_arrays(case), np.random.default_rng(2).permutation(8)
    axes = case.args.values()
    shuffled = [x[order] if "B" in a else x for a, x in zip(axes, arrays, strict=True)]
    got, want = call(name, *shuffled), call(name, *arrays)
    if "B" in case.out:
        want = jax.tree.map(lambda x: x[order], want)
    assert_trees(close(ROUNDING, ROUNDING), got, want)


@every
def test_eight_devices_give_what_one_gives(name):
    case = CASES[name]
    mask, arrays = make_mask(case), make_arrays(case)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = [
        jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data" if "B" in a else None))
        )
        if a
        else x
        for a, x in zip(case.args.values(), arrays, strict=True)
    ]
    got = value_and_grads(name, mask, spread)
    assert_trees(close(ROUNDING, ROUNDING), got, value_and_grads(name, mask, arrays))


CHUNKED = [name for name, case in CASES.items() if "hidden" in case.args]


@pytest.mark.parametrize("name", [name for name in CHUNKED if name != "map_logits"])
def test_the_size_of_chunks_is_heeded(name):
    function = functools.partial(getattr(losses, name), *make_arrays(CASES[name]))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        jax.eval_shape(lambda: function(chunk_size=0))


EXTREMES = [0, 1, -1, 20, -20, 90, -90, 1e3, -1e3, 1e4, -1e4]


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_are_finite_at_extremes(name, seed):
    case, rng = CASES[name], np.random.default_rng(seed)
    arrays = [
        rng.choice(EXTREMES, x.shape).astype(np.float32) if x.dtype.kind == "f" else x
        for x in make_arrays(case)
    ]
    for leaf in jax.tree.leaves(value_and_grads(name, make_mask(case), arrays)):
        assert np.all(np.isfinite(leaf))


def wrong_arguments(case):
    """(reason, arrays) with one argument wrong in each."""
    arrays = make_arrays(case)
    for i, (arg, axes) in enumerate(case.args.items()):
        x = arrays[i]
        bad = {"rank": x[..., None]}
        others = [a for other, a in case.args.items() if other != arg]
        if axes and any(axes[0] in other for other in others):
            bad["broadcasts"] = x[:1]
        if x.dtype.kind == "f" and arg not in case.any_float:
            bad |= {"bfloat16": jnp.bfloat16(x), "float16": x.astype("f2")}
        if x.dtype.kind != "f":
            bad["float"] = x.astype("f4")
        elif axes:
            bad["int"] = x.astype("i4")
        if case.out == "BT" and len(arrays) == 1:
            del bad["rank"]  # logits have any number of axes
        for reason, value in bad.items():
            yield f"{arg}: {reason}", [*arrays[:i], value, *arrays[i + 1 :]]


@every
def test_wrong_rank_shape_or_dtype_raises_when_traced(name):
    for reason, arrays in wrong_arguments(CASES[name]):
        try:
            jax.eval_shape(functools.partial(call, name), *arrays)
        except AssertionError:
            continue
        pytest.fail(f"{name} accepts {reason}")
