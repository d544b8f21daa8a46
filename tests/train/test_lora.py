"""Adapters in every recipe: by the command, and what a step makes of them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jalign import plan, sharding
from jalign.models import Model, ModelConfig, add_scalar_head, lora
from jalign.models.lora import LoraConfig
from jalign.plan.recipes import shapes_of
from jalign.pretrained import load_pretrained, open_pretrained
from jalign.train import RewardConfig, SFTConfig, objectives, optim, step
from jalign.train.config import ComputeOptions, LoraOptions
from jalign.train.metrics import training_flops_per_token
from jalign.train.trained import loading, part
from tests.train import tiny, world

LORA = ("--lora-rank", "2", "--learning-rate", "1e-2", "--schedule", "constant")
RECIPES = {
    "reward": (),
    "dpo": ("--lora-targets", "attention", "--rslora"),
    "ppo": ("--save-critic",),
    "grpo": ("--group-size", "2", "--lora-train", "embed"),
    "sft": ("--quantize", "nf4", "--dtype", "bfloat16"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


def flags(command, here):
    source = str(here / "reward.py:words")
    online = ("--reward", source, "--max-new-tokens", "4")
    return (*LORA, *RECIPES[command], *(online if command in ("ppo", "grpo") else ()))


def adapter_of(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("command", RECIPES)
def test_a_run_ends_in_an_adapter(command, here, tmp_path):
    """OUT/adapter alone, which every command reads; the base's arrays as they were."""
    assert world.run(command, here, tmp_path, *flags(command, here)) == 0
    assert not (tmp_path / "model").exists()
    written = adapter_of(tmp_path)
    assert any(x.any() for name, x in written.items() if "lora_B" in name)
    assert ("base_model.model.score.weight" in written) == (command == "reward")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(here / "model")
    assert told["use_rslora"] == (command == "dpo")
    model, params, _ = load_pretrained(tmp_path / "adapter")
    assert model.config.num_labels == (command == "reward")
    base = load_pretrained(here / "model").params["layers"]
    found = lora.split(params)[0]["layers"]
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), base, found))
    if command == "ppo":
        assert load_pretrained(tmp_path / "critic").model.config.num_labels == 1


def test_a_run_goes_on_exactly_with_dropout_and_not_on_another_base(
    here, tmp_path, capsys
):
    """Stopped after one of two steps: the same bits; the base's are compared."""
    given = (*LORA, "--lora-dropout", "0.3", "--checkpoint-every", "1")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert world.run("sft", here, cut, *given, "--steps", "1") == 0
    assert world.run("sft", here, cut, *given) == 0
    assert world.run("sft", here, whole, *given) == 0
    for name, x in adapter_of(whole).items():
        np.testing.assert_array_equal(adapter_of(cut)[name], x)
    other = world.make(tmp_path / "other")
    file = other / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1  # of the last weight
    file.write_bytes(raw)
    flipped = ("--model", str(other / "model"))
    assert world.run("sft", here, cut, *given, *flipped, "--steps", "3") == 2
    assert "the model's weights changed" in capsys.readouterr().err
    # An adapter is trained on; to put another beside it is refused.
    on = ("--model", str(whole / "adapter"))
    assert world.run("sft", here, tmp_path / "b", *given, *on) == 2
    assert "has adapters already" in capsys.readouterr().err
    rest = ("--learning-rate", "1e-2", "--lora-dropout", "0.3")
    assert world.run("sft", here, tmp_path / "b", *rest, *on) == 0
    moved = adapter_of(tmp_path / "b")
    assert moved.keys() == adapter_of(whole).keys()
    told = json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(here / "model")


def start(mesh=None, rank=4):
    model = tiny.model(mesh)
    params = model.init(jax.random.key(0))
    adapters = lora.init(model, params, LoraConfig(rank), jax.random.key(1))
    trained, scales = lora.trainable(adapters)
    return model, trained, lora.join(params, scales)


def test_steps_on_a_mesh_and_in_micro_batches_are_those_of_one_device():
    batch, ends = tiny.token_batch(), []
    for mesh, parts in ((None, 1), (sharding.make_mesh(fsdp=4, tensor=2), 2)):
        model, trained, frozen = start(mesh)
        tx, _ = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2), 9)
        state = step.init_state(trained, tx, jax.random.key(1), mesh=mesh)
        objective = objectives.make_sft_objective(model)
        fn = step.make_train_step(objective, tx, microbatches=parts)
        for _ in range(3):
            placed = sharding.put_batch(batch, mesh)
            state, metrics = fn(state, placed, frozen)
        ends.append((jax.device_get(state.params), float(metrics["loss"])))
    (one, loss), (other, on_mesh) = ends
    assert abs(loss - on_mesh) < 1e-5
    # Adam divides small gradients by their own size: rounding is seen in full there.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), one, other)


def test_the_loss_starts_at_log_2_and_the_state_holds_no_base():
    model, trained, frozen = start()
    batch = tiny.pair_batch()
    base, _ = lora.split(frozen)
    from jalign import forward

    chosen, rejected = forward.make_reference_fn(model)(base, batch)
    batch = batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    tx, _ = optim.make_optimizer(optim.OptimConfig(), 9)
    state = step.init_state(trained, tx, jax.random.key(1))
    sizes = {x.size for x in jax.tree.leaves(state.params)}
    assert max(x.size for x in jax.tree.leaves(state.opt_state)) == max(sizes)
    fn = step.make_train_step(objectives.make_dpo_objective(model, beta=0.1), tx)
    _, metrics = fn(state, batch, frozen)
    np.testing.assert_allclose(metrics["loss"], math.log(2), atol=1e-6)
    assert all(not x.is_deleted() for x in jax.tree.leaves(frozen))


def test_a_step_costs_two_thirds_of_full_training():
    """By XLA's count, of unrolled layers; and by what `mfu` is reckoned with."""
    model = Model(ModelConfig(64, 256, 704, 2, 8, 4, 32), unroll=True)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def make(key):
        return lora.init(model, params, LoraConfig(8), key)

    trained, scales = lora.trainable(jax.eval_shape(make, jax.random.key(1)))

    def loss(params):
        hidden, _ = model.apply(params, jnp.ones((4, 32), jnp.int32))
        return jnp.sum(hidden)

    def flops(function, *args):
        compiled = jax.jit(jax.grad(function)).lower(*args).compile()
        return compiled.cost_analysis()["flops"]

    frozen = lora.join(params, scales)
    part = flops(lambda t, f: loss(lora.join(f, t)), trained, frozen)
    assert 0.6 < part / flops(loss, params) < 0.70
    told = training_flops_per_token(trained, frozen) / training_flops_per_token(params)
    assert 0.66 < told < 0.72  # 4 of 6, and the adapters


@pytest.mark.parametrize(
    "given, words",
    [
        (("--lora-alpha", "8"), "lora_alpha"),
        (("--lora-rank", "0"), "lora_rank must be >= 1"),
        (("--lora-rank", "2", "--lora-targets", "q_porj"), "q_porj"),
        (("--lora-rank", "2", "--lora-rank-pattern", "q_proj"), "is not as"),
        (("--lora-rank", "2", "--optimizer", "muon"), "muon"),
        (("--lora-dropout", "0.1"), "no adapters"),
        (("--quantize", "int8"), "quantize: there are no adapters"),
        (("--base", "x"), "no adapter"),
    ],
)
def test_flags_that_do_nothing_are_refused(given, words, here, tmp_path, capsys):
    assert world.run("sft", here, tmp_path, *given) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("config_class", [SFTConfig, RewardConfig])
def test_a_plan_counts_what_a_run_loads_and_trains(config_class, quantize, here):
    """Names, shapes and dtypes of what is trained and what is frozen, at both ends."""
    options = LoraOptions(lora_rank=2, quantize=quantize)
    compute = ComputeOptions(dtype="bfloat16")
    given = {"model": str(here / "model"), "data": "", "out": ""}
    config = config_class(**given, lora=options, compute=compute)
    opened = open_pretrained(here / "model")
    how = loading(config, opened)
    model, params, _ = load_pretrained(opened, dtype=compute.dtype, **how)
    if config_class is RewardConfig:
        model, params = add_scalar_head(model, params, key=jax.random.key(0))
    real = part(config, model, params, opened)
    planned = shapes_of(config, model)

    def told(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)

    assert told(real.params) == told(planned[0])
    assert told(real.frozen) == told(planned[1])


def test_a_plan_refuses_what_it_does_not_read(here):
    with pytest.raises(ValueError, match="quantize: there are no adapters"):
        plan.plan("sft", str(here / "model"), quantize="nf4")
    with pytest.raises(ValueError, match="no adapter: leave out --base"):
        plan.plan("sft", str(here / "model"), base="x", lora_rank=2)
