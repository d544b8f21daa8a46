"""The loss that keeps experts busy, of an objective and in a GRPO run."""

import json

import jax
import numpy as np
import pytest

from jalign import data, losses, train
from jalign.demo import ASSETS
from jalign.models import Experts, Model, ModelConfig, read_config, save
from tests.models.tiny import SIZES
from tests.train import tiny


def test_the_coefficient_adds_the_loss_that_is_told():
    config = ModelConfig(**SIZES, family="mixtral", experts=Experts(4, 2))
    model, batch = Model(config), tiny.token_batch()
    params = model.init(jax.random.key(0))
    objective = train.make_sft_objective(model)

    @jax.jit
    def both(params):
        plain = objective(params, batch, jax.random.key(0))
        half = train.with_router_loss(objective, model, 0.5)
        where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        _, routing = model.apply_routed(params, batch.tokens, **where)
        aux = losses.load_balancing_loss(routing.load, routing.probability)
        return plain, half(params, batch, jax.random.key(0)), aux

    plain, routed, aux = both(params)
    np.testing.assert_allclose(routed.sum, plain.sum + 0.5 * aux * plain.count, 1e-6)
    told, count = routed.metrics["aux_loss"]
    np.testing.assert_allclose(told / count, aux, 1e-6)
    assert 1.5 < aux < 4 and "aux_loss" not in plain.metrics


def test_a_model_without_experts_has_no_such_loss():
    model = tiny.model()
    objective = train.make_sft_objective(model)
    assert train.with_router_loss(objective, model, 0.0) is objective
    with pytest.raises(ValueError, match="router_aux_coef 0.1: llama has no experts"):
        train.with_router_loss(objective, model, 0.1)


def test_an_update_of_a_rollout_replays_its_routes(tmp_path, monkeypatch):
    """Two epochs of one rollout: the update's passes go where the rollout's went."""
    seen, apply = [], Model.apply_routed

    def spy(self, params, tokens, **where):
        seen.append(where.get("routing") is not None)
        return apply(self, params, tokens, **where)

    monkeypatch.setattr(Model, "apply_routed", spy)
    base = read_config(ASSETS / "model")
    ids = dict(bos_token_id=base.bos_token_id, eos_token_ids=base.eos_token_ids)
    mixture = dict(family="qwen2_moe", experts=Experts(4, 2, shared_size=8))
    config = ModelConfig(base.vocab_size, 16, 12, 1, 2, 1, 8, **mixture, **ids)
    model, tokenizer = Model(config), data.load_tokenizer(ASSETS / "model")
    save(tmp_path / "model", model, model.init(jax.random.key(0)), tokenizer)
    score = "def score(prompts, completions, **_): return [len(c) for c in completions]"
    (tmp_path / "score.py").write_text(score)
    train.run_grpo(
        model=str(tmp_path / "model"),
        data=str(ASSETS / "prompts_train.jsonl"),
        out=str(tmp_path / "out"),
        reward=f"{tmp_path / 'score.py'}:score",
        steps=1,
        batch_size=4,
        group_size=2,
        num_epochs=2,
        max_new_tokens=8,
        router_aux_coef=0.01,
    )
    text = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    (told,) = [row["aux_loss"] for row in map(json.loads, text) if "aux_loss" in row]
    assert 1.5 < told < 4
    assert seen == [False, True]  # traced once each: the rollout's pass, the update's
