"""Tests for jalign/train/actors.py."""

import jax
import numpy as np
import pytest

from jalign import models, sharding
from jalign.train.actors import in_pieces, load_cast, make_actors, stop_tokens
from jalign.train.online_config import SampleConfig
from jalign.train.shapes import Shapes
from tests.train.grpo_world import make_group_cast, make_grpo_config
from tests.train.ppo_world import (
    STOP,
    make_cast,
    make_config,
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
    cast, config = make_group_cast(), make_grpo_config()
    prompts = [p.tokens.tolist()[:3] for p in make_prompts(4)]
    found = []
    for lengths in ((16,), (2, 16)):
        shapes = Shapes(lengths, (32,))
        actors = make_actors(cast, config, shapes, group_size=4)
        key = jax.random.key(3)
        found.append(actors.sample(cast.policy_params, prompts, key))
    for one, other in zip(*found, strict=True):
        assert len(one) == 16
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_stop_tokens_are_the_models_own_or_the_users():
    cast = make_cast()
    assert stop_tokens(cast, SampleConfig()) == (STOP,)
    assert stop_tokens(cast, SampleConfig(stop_token_ids=(5,))) == (5,)
    with pytest.raises(ValueError, match="stop_token_ids: 99"):
        stop_tokens(cast, SampleConfig(stop_token_ids=(99,)))


def test_the_critic_starts_from_the_reward_model(tmp_path):
    fields = write_world(tmp_path)
    cast = load_cast(make_config(tmp_path / "out", **fields), None)
    assert cast.critic.config.num_labels == 1 and cast.policy.config.num_labels == 0
    np.testing.assert_array_equal(
        cast.critic_params["embed"]["embedding"],
        cast.policy_params["embed"]["embedding"],
    )
    judge, params = models.add_scalar_head(
        cast.policy, cast.policy_params, key=jax.random.key(7)
    )
    models.save(tmp_path / "judge", judge, params, cast.tokenizer)
    # Also where it is a member of an ensemble, behind a function.
    fields["reward"] += f" + mean({tmp_path / 'judge'}, gsm8k_format)"
    cast = load_cast(make_config(tmp_path / "out", **fields), None)
    np.testing.assert_array_equal(
        cast.critic_params["score"]["kernel"], params["score"]["kernel"]
    )
    scores = cast.reward(["a b", "c"], ["a a", "d"], [{}, {}])
    assert scores.shape == (2, 5) and np.isfinite(scores).all()
    assert {"reward 2's weights", "reward 1's file"} <= cast.inputs.keys()
    told = "1*share_of_a + 1*(mean(checkpoint, gsm8k_format))"
    assert cast.inputs["the reward"] == told
