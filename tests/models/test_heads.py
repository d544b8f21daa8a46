"""Tests for the scalar heads, and for logits, of jalign/models/model.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import forward, generate, train
from jalign.models import Model, save
from jalign.models.layers import init_score_head
from jalign.types import TokenBatch
from tests.models.rows import packed_rows
from tests.models.tiny import CONFIGS, random_params, random_tokens


def test_score_is_a_float32_product():
    hidden = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f4")
    kernel = np.array([[1.0], [2.0], [-1.0], [0.5]], "f4")
    score = Model(CONFIGS["reward"]).score
    got = score({"score": {"kernel": kernel}}, jnp.asarray(hidden))
    np.testing.assert_allclose(got, hidden @ kernel[:, 0], rtol=1e-6)
    half = score({"score": {"kernel": kernel}}, jnp.asarray(hidden, jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_initial_scale(key: jax.Array):
    kernel = init_score_head(key, 4095)["kernel"]
    assert kernel.shape == (4095, 1)
    np.testing.assert_allclose(kernel.std(), 1 / 64, rtol=0.05)
    # Variance 1 / (D + 1), not 1 / D.
    normal = jax.random.normal(key, (3, 1))
    np.testing.assert_allclose(init_score_head(key, 3)["kernel"], normal / 2, rtol=1e-6)


CAPPED = dataclasses.replace(CONFIGS["llama"], final_softcap=3.0)


@pytest.mark.parametrize("config", [CONFIGS["llama3"], CAPPED], ids=["tied", "capped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_products_with_the_unembedding_capped(config, dtype):
    model = Model(config, dtype=jnp.dtype(dtype))
    params, tokens = random_params(model), random_tokens()
    hidden = np.asarray(model.apply(params, tokens)[0], np.float64)
    matrix = np.asarray(model.unembed(params), dtype).astype(np.float64)
    want, cap = hidden @ matrix, config.final_softcap
    want = want if cap is None else cap * np.tanh(want / cap)
    got = model.logits(params, tokens)
    assert got.dtype == jnp.float32 and got.shape == (2, 12, 48)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_logits_take_segments_and_positions():
    model = Model(CONFIGS["llama"])
    params, tokens = random_params(model), random_tokens((1, 12))
    ids, positions = packed_rows([[7, 5]], 12)
    got = model.logits(params, tokens, positions=positions, segment_ids=ids)
    alone = model.logits(params, tokens[:, 7:])
    np.testing.assert_allclose(got[:, 7:], alone, atol=1e-4)


def test_no_caller_forgets_the_cap():
    """Scores, the loss of SFT and sampling are of the logits that the model shows."""
    model = Model(CAPPED)
    params, tokens = random_params(model), random_tokens((2, 12))
    logs = jax.nn.log_softmax(model.logits(params, tokens))
    want = np.take_along_axis(np.asarray(logs[:, :-1]), tokens[:, 1:, None], 2)[..., 0]
    mask = np.broadcast_to(np.arange(12) > 0, (2, 12))
    steps = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    batch = TokenBatch(tokens, mask, np.ones_like(tokens), steps)
    got = forward.token_logps(model, params, batch)
    np.testing.assert_allclose(got[:, 1:], want, rtol=1e-4)
    loss = train.make_sft_objective(model)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss.sum, -want.sum(), rtol=1e-4)
    prompts = [row.tolist() for row in tokens]
    made = generate.generate(
        model, params, prompts, key=jax.random.key(0), max_new_tokens=1, temperature=0
    )
    np.testing.assert_allclose(made.logps[:, 0], logs[:, -1].max(-1), rtol=1e-4)


def test_a_cap_is_not_written_into_a_file_that_cannot_hold_it(tmp_path):
    model = Model(CAPPED)
    with pytest.raises(ValueError, match="softcap"):
        save(tmp_path, model, random_params(model))
