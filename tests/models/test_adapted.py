"""jalign/models/adapted.py: two orders of one product, and what a step of adapters
computes and keeps of it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import train
from jalign.models import Model, ModelConfig, lora
from jalign.models.adapted import equations, low_rank, merged, pays_to_merge
from jalign.models.platform import CPU, GPU, PLAIN
from jalign.models.quantize import quantize
from jalign.types import TokenBatch
from tests.models.adapters import random_adapters

SHAPES = {  # equation -> inputs, outputs
    "btd,dnh->btnh": ((6,), (4, 3)),
    "btnh,nhd->btd": ((4, 3), (6,)),
    "btd,df->btf": ((6,), (10,)),
}


@pytest.mark.parametrize("equation", SHAPES)
def test_both_orders_and_their_gradients_are_the_closed_form(equation):
    """y = x (W + s A B) by float64 matrices; and L = <g, y> by the chain rule."""
    inputs, outputs = SHAPES[equation]
    rng = np.random.default_rng(0)
    shapes = ((2, 9, *inputs), (*inputs, *outputs), (*inputs, 2), (2, *outputs))
    args = [rng.normal(size=shape) for shape in shapes]
    num_inputs, num_outputs = np.prod(inputs), np.prod(outputs)
    flat = (18, num_inputs), (num_inputs, num_outputs), (num_inputs, 2)
    flat = *flat, (2, num_outputs)
    x, w, a, b = (z.reshape(f) for z, f in zip(args, flat, strict=True))
    s, g = 1.5, rng.normal(size=(18, num_outputs))
    whole = w + s * a @ b
    of_factors = s * x.T @ g @ b.T, s * (x @ a).T @ g, np.vdot(g, x @ a @ b)
    want = x @ whole, g @ whole.T, x.T @ g, *of_factors

    def separate(x, kernel, a, b, scale):
        y = CPU.einsum(equation, x, kernel)
        return y + scale * low_rank(CPU, equation, x, a, b)

    given = [jnp.asarray(z, jnp.float32) for z in (*args, s)]
    for order in (partial(merged, equation), separate):
        y, vjp = jax.vjp(order, *given)
        got = y, *vjp(jnp.asarray(g, jnp.float32).reshape(y.shape))
        for one, other in zip(got, want, strict=True):
            one = np.asarray(one).reshape(np.shape(other))
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_the_equations_of_the_docstring():
    said = "btd,dr->btr", "btr,rnh->btnh", "dr,rnh->dnh", "btnh,dnh->btd"
    assert equations("btd,dnh->btnh") == (*said, "btnh,rnh->btr")


def test_where_adapters_are_merged():
    x, kernel = jnp.ones((2, 8, 4)), jnp.ones((4, 16))
    assert pays_to_merge(CPU, x, kernel)
    assert not pays_to_merge(CPU, x[:, :7], kernel)  # fewer tokens than outputs
    assert not pays_to_merge(CPU, x.astype(jnp.bfloat16), kernel)
    assert not pays_to_merge(CPU, x, kernel.astype(jnp.bfloat16))
    assert not pays_to_merge(CPU, x, quantize(kernel, "int8", num_inputs=1))
    assert not pays_to_merge(PLAIN, x, kernel) and not pays_to_merge(GPU, x, kernel)
    plain = Model(CONFIG, attention="plain").runs_on  # for forward mode
    assert not pays_to_merge(plain, x, kernel)


CONFIG = ModelConfig(80, 24, 40, 3, 4, 2, 6, qkv_bias=True, tie_embeddings=True)
TX = train.make_optimizer(train.OptimConfig(learning_rate=1e-3), 3)[0]


def compiled(model: Model, tokens: int, *, adapters: bool):
    """A supervised step of one row, compiled."""
    ids, mask = jnp.ones((1, tokens), jnp.int32), jnp.ones((1, tokens), bool)
    params, frozen = model.param_shapes(), None
    if adapters:
        trained, scales = lora.trainable(random_adapters(model, lora.LoraConfig(4)))
        params, frozen = trained, lora.join(params, scales)
    state = train.abstract_state(params, TX)
    step = train.make_train_step(train.make_sft_objective(model), TX)
    batch = TokenBatch(tokens=ids, positions=ids, segment_ids=ids, completion_mask=mask)
    return step.lower(state, batch, frozen).compile()


def products_of(step) -> set[tuple[int, ...]]:
    """The shapes of all products in a compiled step, axes in order of size."""
    found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", step.as_text())
    return {tuple(sorted(map(int, shape.split(",")))) for shape in found}


def test_a_step_of_adapters_has_no_gradient_of_a_frozen_kernel_or_head():
    """11 tokens are too few to merge, so that no product is as large as a kernel."""
    model = Model(CONFIG)
    frozen = {(12, 24), (24, 24), (24, 40), (24, 80)}  # k and v, q and o, mlp, head
    assert frozen <= products_of(compiled(model, 11, adapters=False))
    found = products_of(compiled(model, 11, adapters=True))
    assert not frozen & found and (4, 24) in found


def kept(model: Model, *, adapters: bool) -> int:
    """Numbers of a row of 512 tokens that the backward pass is handed."""
    params = model.param_shapes()
    if adapters:
        params = lora.join(params, random_adapters(model, lora.LoraConfig(4)))
    tokens = jnp.zeros((1, 512), jnp.int32)

    def residuals(params):
        base, own = lora.split(params)
        return jax.vjp(
            lambda x: model.apply(lora.join(base, x), tokens)[0],
            own if adapters else base,
        )[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
    return sum(leaf.size for leaf in leaves if 512 in leaf.shape)


@pytest.mark.parametrize(
    ("row", "dtype", "low"),
    [(CPU, "float32", 0), (CPU, "bfloat16", 7 * 4), (GPU, "float32", 7 * 4)],
)
def test_of_an_adapted_projection_the_sum_is_kept(row, dtype, low):
    """And x A, of 7 projections of rank 4, where adapters are not merged; not the
    products of the base and of the adapters apart."""
    platform = row._replace(attention="blocked", unroll_training=0)
    model = Model(CONFIG, platform=platform, dtype=jnp.dtype(dtype))
    full, small = (kept(model, adapters=x) for x in (False, True))
    assert small <= full + CONFIG.num_layers * 512 * low
