"""Tests for jalign/train/online_models.py."""

import jax
import numpy as np
import pytest

from jalign import forward, models, sharding
from jalign.train.online_models import (
    load_models,
    make_functions,
    reference_params,
    stop_tokens,
)
from jalign.train.shapes import Shapes, in_pieces
from jalign.types import TokenBatch
from tests.models.tiny import CONFIGS, random_params, random_tokens
from tests.train.grpo_world import make_group_models, make_grpo_config
from tests.train.ppo_world import (
    STOP,
    make_config,
    make_models,
    make_prompts,
    write_world,
)


@pytest.mark.parametrize("mesh_size", [None, 4])
@pytest.mark.parametrize("rows", [4, 8])
def test_pieces_together_are_the_whole(mesh_size, rows):
    mesh = mesh_size and sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    batch = {"x": np.arange(14.0, dtype=np.float32).reshape(7, 2)}
    double = jax.jit(lambda b: (2 * b["x"], b["x"].sum(axis=1)))
    twice, sums = in_pieces(double, batch, rows=rows, mesh=mesh)
    np.testing.assert_array_equal(twice, 2 * batch["x"])
    np.testing.assert_array_equal(sums, batch["x"].sum(axis=1))


def test_a_group_has_the_same_draws_in_either_shape():
    """A rollout with a longer prompt than most is sampled in the evaluation's shape."""
    loaded, config = make_group_models(), make_grpo_config()
    prompts = [p.tokens.tolist()[:3] for p in make_prompts(4)]
    found = []
    for lengths in ((16,), (2, 16)):
        shapes = Shapes(lengths, (32,))
        functions = make_functions(loaded, config, shapes, group_size=4)
        key = jax.random.key(3)
        found.append(functions.sample(loaded.params["policy"], prompts, key))
    for one, other in zip(*found, strict=True):
        assert len(one) == 16
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_stop_tokens_are_the_models_own_or_the_users():
    loaded = make_models()
    assert stop_tokens(loaded) == (STOP,)
    assert stop_tokens(loaded, (5,)) == (5,)
    with pytest.raises(ValueError, match="stop_token_ids: 99"):
        stop_tokens(loaded, (99,))


def test_the_critic_starts_from_the_reward_model(tmp_path):
    fields = write_world(tmp_path)
    loaded = load_models(make_config(tmp_path / "out", **fields), None)
    policy, critic = (loaded.models[name] for name in ("policy", "critic"))
    assert critic.config.num_labels == 1 and policy.config.num_labels == 0
    np.testing.assert_array_equal(
        loaded.params["critic"]["embed"]["embedding"],
        loaded.params["policy"]["embed"]["embedding"],
    )
    judge, params = models.add_scalar_head(
        policy, loaded.params["policy"], key=jax.random.key(7)
    )
    models.save(tmp_path / "judge", judge, params, loaded.tokenizer)
    # Also where it is a member of an ensemble, behind a function.
    fields["reward"] += f" + mean({tmp_path / 'judge'}, gsm8k_format)"
    loaded = load_models(make_config(tmp_path / "out", **fields), None)
    np.testing.assert_array_equal(
        loaded.params["critic"]["score"]["kernel"], params["score"]["kernel"]
    )
    scores = loaded.reward(["a b", "c"], ["a a", "d"], [{}, {}])
    assert scores.shape == (2, 5) and np.isfinite(scores).all()
    assert {"reward 2's weights", "reward 1's file"} <= loaded.inputs.keys()
    told = "1*share_of_a + 1*(mean(checkpoint, gsm8k_format))"
    assert loaded.inputs["the reward"] == told


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])  # biases, norms, tied
def test_the_reference_is_kept_in_the_products_dtype_and_says_the_same(name):
    policy = models.Model(CONFIGS[name], dtype="bfloat16")
    params = random_params(policy)
    reference = reference_params(policy, params)
    for path, leaf in jax.tree.leaves_with_path(reference):
        kept = path[-1].key == "scale"
        assert leaf.dtype == (np.float32 if kept else policy.dtype), path
    batch = make_batch(random_tokens((2, 12)))
    got, want = (
        jax.jit(forward.token_logps, static_argnums=0)(policy, given, batch)
        for given in (reference, params)
    )
    assert np.any(want)
    np.testing.assert_array_equal(got, want)


def make_batch(tokens):
    mask, ids = np.ones(tokens.shape, bool), np.ones(tokens.shape, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), ids.shape)
    return TokenBatch(tokens, mask, ids, positions)
