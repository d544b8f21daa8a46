"""The estimate: exact where it says so, strict, and monotone where it is a formula."""

import jax
import numpy as np
import pytest

from jalign import plan, sharding
from jalign.models import Model, ModelConfig

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
# Llama 3 8B.
LARGE = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)
LEAN = dict(dtype="bfloat16", remat=True, max_length=2048)
ON_16 = dict(topology="v5e:4x4", mesh="fsdp=16", batch_size=16, **LEAN)


def _bytes(result, name):
    rows = [*result.resident, *(r for rows in result.transient.values() for r in rows)]
    return {row.name: row.bytes for row in rows}[name]


def test_parameters_are_the_bytes_that_a_device_really_holds():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shapes = Model(TINY).param_shapes()
    places = sharding.param_shardings(mesh, shapes)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params = jax.tree.leaves(jax.device_put(zeros, places))
    first = [x.addressable_shards[0].data.nbytes for x in params]
    result = plan.plan("sft", TINY, mesh="data=2,fsdp=2,tensor=2", max_length=16)
    assert _bytes(result, "parameters") == sum(first)
    assert _bytes(result, "gradients") == sum(first)
    moments = _bytes(result, "optimizer state") - 2 * sum(first)
    assert 0 < moments <= 16  # the step counts


def test_adam_state_of_8b_on_16_chips():
    result = plan.plan("sft", LARGE, **ON_16)
    assert result.num_parameters == 8_030_261_248
    assert _bytes(result, "parameters") == pytest.approx(4 * 8.03e9 / 16, rel=1e-3)
    assert _bytes(result, "optimizer state") == pytest.approx(8 * 8.03e9 / 16, rel=1e-3)
    assert result.fits


def test_adafactor_needs_less_than_adam():
    adam, factored = (
        plan.plan("sft", LARGE, **ON_16, optimizer=name)
        for name in ("adamw", "adafactor")
    )
    name = "optimizer state"
    assert _bytes(factored, name) < 0.1 * _bytes(adam, name)


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_longer_rows_need_more(recipe):
    short, long = (
        plan.plan(recipe, LARGE, **(ON_16 | {"max_length": length})).total
        for length in (512, 4096)
    )
    assert long > short


def test_ppo_keeps_four_models():
    result = plan.plan("ppo", LARGE, **ON_16)
    assert [row.name for row in result.resident] == [
        "policy parameters",
        "policy optimizer state",
        "critic parameters",
        "critic optimizer state",
        "reference parameters",
        "reward model",
    ]
    # All of it in bfloat16 but for the norms: what a run holds.
    policy = _bytes(result, "policy parameters")
    reference = _bytes(result, "reference parameters")
    assert policy / 2 < reference < 0.501 * policy
    # bfloat16 keys and values of one row: 2 x 32 layers x 2048 x 8 heads x 128 x 2 B.
    assert _bytes(result, "KV cache") == 2 * 32 * 2048 * 8 * 128 * 2
    assert result.fits is False and "32 devices" in result.advice


def test_grpo_and_a_shared_trunk_train_one_model():
    for recipe, settings in (("grpo", {"beta": 0.04}), ("ppo", {"shared_trunk": True})):
        result = plan.plan(recipe, LARGE, **ON_16, **settings)
        assert [row.name for row in result.resident] == [
            "policy parameters",
            "policy optimizer state",
            "reference parameters",
            "reward model",
        ]
        assert set(result.transient) == {"update", "rollout"}
    separate = plan.plan("ppo", LARGE, **ON_16)
    shared = plan.plan("ppo", LARGE, shared_trunk=True, **ON_16)
    assert shared.num_parameters == separate.num_parameters + LARGE.hidden_size
    assert shared.total < 0.8 * separate.total


def test_microbatches_need_less_for_activations():
    one, four = (
        plan.plan("sft", LARGE, **(ON_16 | {"batch_size": 64}), microbatches=n)
        for n in (1, 4)
    )
    assert _bytes(four, "layer inputs") == _bytes(one, "layer inputs") // 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mesh="fsdp=3"), "3 is not the number of devices, 8"),
        (dict(mesh="tensor=8", batch_size=8), "heads.*4.*tensor"),
        (dict(batch_size=6), "batch_size 6 is not a multiple"),
        (dict(microbatches=3), "microbatches 3 does not divide"),
        (dict(topology="v9:4x4"), "not KIND:SHAPE"),
        (dict(max_length=0), "max_length must be >= 2"),
        (dict(shared_trunk=True), "unknown setting 'shared_trunk'"),
        (dict(steps=3, warmup_steps=3), "warmup_steps 3 must be less than steps 3"),
    ],
)
def test_what_would_fail_in_training_fails_here(settings, message):
    with pytest.raises(ValueError, match=message):
        plan.plan("sft", TINY, **settings)


def test_grpo_has_a_reference_where_its_loss_has_one():
    def names(**settings):
        return [
            row.name for row in plan.plan("grpo", LARGE, **ON_16, **settings).resident
        ]

    assert "reference parameters" not in names()
    assert "reference parameters" in names(beta=0.04)
    assert "reference parameters" in names(stop_kl=10.0)


def test_an_update_has_the_rows_of_a_minibatch_and_a_rollout_those_of_all_groups():
    result = plan.plan("grpo", LARGE, **ON_16, group_size=8, num_minibatches=4)
    notes = {row.name: row.note for rows in result.transient.values() for row in rows}
    assert notes["layer inputs"].startswith("2 rows")  # 16 x 8 / 4 over 16 chips
    # To decode, 8 chips share a copy of the weights, and half of the rows.
    assert notes["KV cache"].startswith("64 rows")
    assert notes["weights to decode with"] == "bfloat16 data=2, tensor=8"
    with pytest.raises(ValueError, match="a minibatch of 12 rows is not a multiple"):
        plan.plan("ppo", TINY, batch_size=24, num_minibatches=2)
