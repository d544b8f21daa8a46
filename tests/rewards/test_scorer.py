"""Tests for jalign/rewards/scorer.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from jalign import models, rewards, sharding


def tiny(mesh=None):
    config = models.ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_labels=1,
    )
    return models.Model(config, mesh=mesh)


SEQUENCES = [[1, 2, 3], [4], list(range(5, 25)), [9, 9], [1, 2]]


def test_score_tokens_is_the_score_at_the_last_token(key):
    model = tiny()
    params = model.init(key)
    got = rewards.score_tokens(model, params, SEQUENCES, batch_size=4)
    for row, tokens in enumerate(SEQUENCES):
        hidden, _ = model.apply(params, jnp.array([tokens + [7] * (20 - len(tokens))]))
        expected = model.score(params, hidden)[0, len(tokens) - 1]
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
    on_mesh = tiny(sharding.make_mesh())
    again = rewards.score_tokens(on_mesh, params, SEQUENCES, batch_size=8)
    np.testing.assert_allclose(again, got, atol=1e-5)


def test_score_tokens_refuses_what_has_no_score(key):
    model = tiny()
    params = model.init(key)
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        rewards.score_tokens(model, params, [[1], []])
    assert rewards.score_tokens(model, params, []).shape == (0,)
    broken = params | {"score": {"kernel": jnp.full((32, 1), jnp.nan)}}
    with pytest.raises(ValueError, match="gave nan for row 0"):
        rewards.score_tokens(model, broken, [[1]])
    language = models.Model(
        models.ModelConfig(64, 32, 48, 1, 4, 2, 8, tie_embeddings=True)
    )
    with pytest.raises(ValueError, match="num_labels=1"):
        rewards.score_tokens(language, {}, [[1]])


def test_model_reward_scores_prompt_completion_and_eos(real_data, key):
    from jalign import data

    tokenizer = data.load_tokenizer(real_data / "stories260k")
    model = models.Model(models.ModelConfig(512, 32, 48, 1, 4, 2, 8, num_labels=1))
    params = model.init(key)
    prompts, completions = ["Zoo", "Once upon"], [" was big.", " a time"]
    reward = rewards.model_reward(model, params, tokenizer)
    got = reward(prompts, completions, [{}, {}])
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    expected = rewards.score_tokens(model, params, ids)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    again = rewards.model_reward(model, params, tokenizer, max_length=3)
    short = rewards.score_tokens(model, params, [row[:3] for row in ids])
    np.testing.assert_allclose(again(prompts, completions, [{}, {}]), short, atol=1e-5)
