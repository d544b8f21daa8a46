"""Each objective is its loss function, masked and summed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import forward, losses
from jalign.train import objectives
from jalign.train.loss_spec import parse_losses
from jalign.train.loss_table import REGISTRY
from tests.train import tiny
from tests.train.tiny import ratio

KEY = jax.random.key(0)
SIDES = ("chosen", "rejected")


def test_sft(language_model):
    model, params = language_model
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    loss = objectives.make_sft_objective(model)(params, batch, KEY)
    np.testing.assert_allclose(loss.sum, -np.sum(logps), rtol=1e-5)
    assert float(loss.count) == batch.completion_mask.sum()
    np.testing.assert_allclose(loss.metrics["nll"][0], loss.sum, rtol=1e-6)
    assert 0 <= ratio(loss.metrics["mean_token_accuracy"]) <= 1
    assert 0 < ratio(loss.metrics["entropy"]) <= np.log(tiny.VOCAB) + 1e-4
    smooth = objectives.make_sft_objective(model, label_smoothing=0.2, z_loss=0.1)
    other = smooth(params, batch, KEY)
    assert float(other.sum) != float(loss.sum)
    np.testing.assert_allclose(other.metrics["nll"][0], loss.sum, rtol=1e-6)


def test_dpo_starts_at_log_two(language_model):
    model, params = language_model
    batch = tiny.pair_batch(4)
    chosen, rejected = forward.make_reference_fn(model)(params, batch)
    batch = batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    objective = objectives.make_dpo_objective(model, beta=0.3)
    loss = objective(params, batch, KEY)
    np.testing.assert_allclose(loss.sum / loss.count, np.log(2), rtol=1e-4)
    assert float(loss.count) == 4
    np.testing.assert_allclose(ratio(loss.metrics["rewards/margins"]), 0, atol=1e-4)
    shifted = batch._replace(ref_chosen_logps=chosen - 10.0)
    loss = objective(params, shifted, KEY)
    np.testing.assert_allclose(ratio(loss.metrics["rewards/margins"]), 3, rtol=1e-3)
    np.testing.assert_allclose(ratio(loss.metrics["logps/chosen"]), chosen.mean(), 1e-4)
    assert ratio(loss.metrics["rewards/accuracies"]) == 1
    trained = batch.rows.completion_mask.sum(-1).mean(0)  # a row a side, chosen first
    for side, length in zip(SIDES, trained, strict=True):
        assert ratio(loss.metrics[f"lengths/{side}"]) == length
    np.testing.assert_allclose(loss.sum / loss.count, np.log1p(np.exp(-3.0)), rtol=1e-3)


def test_reward(scored_model):
    model, params = scored_model
    batch = tiny.pair_batch(4)
    chosen, rejected = forward.pair_rewards(model, params, batch)
    loss = objectives.make_reward_objective(model)(params, batch, KEY)
    expected = losses.bradley_terry_loss(chosen[:, 0], rejected[:, 0]).sum()
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)
    low = jnp.minimum(chosen, rejected).min()
    np.testing.assert_allclose(loss.metrics["min_reward"][0], low, rtol=1e-5)
    centered = objectives.make_reward_objective(model, center_coef=0.5)
    extra = 0.5 * jnp.square(chosen + rejected).sum()
    got = centered(params, batch, KEY).sum
    np.testing.assert_allclose(got, expected + extra, rtol=1e-5)


def test_terms_are_summed_and_reported(language_model):
    model, params = language_model
    batch = tiny.pair_batch(4)
    batch = batch._replace(
        ref_chosen_logps=jnp.full((4, 1), -9.0),
        ref_rejected_logps=jnp.full((4, 1), -8.0),
    )
    inputs = objectives.pair_inputs(model, params, batch)
    terms = parse_losses("dpo:beta=0.3 + 0.5*sft", REGISTRY["dpo"])
    objective = objectives.make_dpo_objective(model, terms=terms, beta=0.3)
    loss = objective(params, batch, KEY)
    dpo = losses.dpo_loss(
        *(inputs[f"{ref}{side}_logps"] for ref in ("", "ref_") for side in SIDES),
        beta=0.3,
    )
    chosen = jax.tree.map(lambda x: x[:, 0], batch.rows)
    mask = chosen.completion_mask
    logps = forward.token_logps(model, params, chosen)
    nll = -np.sum(logps, 1) / mask.sum(1)
    np.testing.assert_allclose(loss.sum, np.sum(dpo + 0.5 * nll), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss/dpo"][0], dpo.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss/sft"][0], 0.5 * nll.sum(), rtol=1e-5)


def test_every_preference_loss_trains(language_model):
    model, params = language_model
    refs = jnp.full((4, 1), -9.0)
    batch = tiny.pair_batch(4)
    batch = batch._replace(ref_chosen_logps=refs, ref_rejected_logps=refs)
    inputs = objectives.pair_inputs(model, params, batch)
    mask = inputs.pop("mask")
    for name in REGISTRY["dpo"]:
        spec = "alphapo:alpha=0.25" if name == "alphapo" else name
        term = parse_losses(spec, REGISTRY["dpo"])[name]
        grads = jax.grad(lambda x, f=term: f(x | {"mask": mask}).sum())(inputs)
        flows = {k for k, g in grads.items() if np.any(g)}
        policy = {k for k in term.entry.inputs if k != "mask" and "ref" not in k}
        assert flows == policy, name


def test_dft_is_summed_with_cross_entropy(language_model):
    model, params = language_model
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    terms = parse_losses("sft + 2*dft", REGISTRY["sft"])
    objective = objectives.make_sft_objective(model, terms=terms)
    loss = objective(params, batch, KEY)
    dft = np.where(batch.completion_mask, losses.dft_loss(logps), 0).sum()
    np.testing.assert_allclose(loss.sum, -np.sum(logps) + 2 * dft, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss/dft"][0], 2 * dft, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_filler_changes_neither_loss_nor_metrics(kind, language_model, scored_model):
    """A row more that holds no document, and whatever lies at its places."""
    model, params = scored_model if kind == "reward" else language_model
    batch = tiny.token_batch(4) if kind == "sft" else tiny.pair_batch(4)
    more = jax.tree.map(lambda x: np.concatenate([x, np.full_like(x[:1], 3)]), batch)
    rows = more if kind == "sft" else more.rows
    for mask in (rows.segment_ids, rows.completion_mask):
        mask[-1] = 0
    objective = getattr(objectives, f"make_{kind}_objective")(model)
    want, got = (objective(params, x, KEY) for x in (batch, more))
    assert float(got.count) == float(want.count)
    chex.assert_trees_all_close(got, want, rtol=1e-5)
