"""Tests for jalign/train/grpo_config.py."""

import pytest

from jalign import losses
from jalign.train.grpo_config import GRPOConfig, GRPOOptions
from jalign.train.loss_table import REGISTRY
from jalign.train.run_config import ComputeOptions
from tests.train.grpo_world import make_grpo_config
from tests.train.test_ppo_config import leaves


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPOOptions(group_size=1), "group_size must be >= 2, got 1"),
        (lambda: GRPOOptions(beta=-1), "beta must be >= 0"),
        (lambda: GRPOOptions(clip_eps=0), "clip_eps must be > 0"),
        (lambda: GRPOOptions(clip_eps=1.5), "clip_eps must be < 1"),
        (lambda: GRPOOptions(loss="gspo:clip_eps_high=-1"), "clip_eps_high .*'gspo'"),
        (lambda: GRPOOptions(loss="gpro"), "'gpro' is not one of .*did you mean"),
        (lambda: GRPOOptions(loss="sapo", clip_eps=0.1), "clip_eps is set, but no"),
        (lambda: GRPOOptions(loss="grpo + dapo"), "averaged in different ways"),
        (lambda: GRPOOptions(loss="rloo + gspo"), "different advantages"),
        (
            lambda: GRPOOptions(loss="reinforce", num_epochs=2),
            "'reinforce' takes no notice .* must be 1, got 2",
        ),
        (
            lambda: make_grpo_config(batch_size=3, grpo={"num_minibatches": 8}),
            "batch_size 3 x group_size 4 = 12 must be a multiple",
        ),
        (
            lambda: make_grpo_config(compute=ComputeOptions(microbatches=3)),
            "num_minibatches x microbatches = 3",
        ),
        (lambda: make_grpo_config(reward="a.py:f +"), "reward 'a.py:f \\+': expected"),
    ],
)
def test_contradictions_name_their_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flags_are_flat_unique_and_hashable():
    names = leaves(GRPOConfig, set())
    assert {"group_size", "beta", "clip_eps_high", "scale_rewards", "loss"} <= names
    assert "whiten_rewards" not in names and "kl_coef" not in names
    hash(make_grpo_config())


def test_batch_size_counts_prompts():
    config = make_grpo_config()
    assert (config.batch_size, config.group_size, config.completions) == (4, 4, 16)


def test_a_reference_is_needed_for_the_kl_only():
    assert not make_grpo_config().has_reference
    assert make_grpo_config(grpo={"beta": 0.04}).has_reference


def test_the_default_is_trls():
    options = GRPOOptions()
    (term,) = options.terms().values()
    assert term.name == "dapo" and term.settings == {"clip_eps": 0.2}
    assert options.group_size == 8 and options.beta == 0 and options.num_epochs == 1
    assert options.reduction is losses.token_mean
    assert options.entry.advantages is losses.group_advantages


@pytest.mark.parametrize("name", REGISTRY["grpo"])
def test_every_loss_has_its_advantages_and_reduction(name):
    options = GRPOOptions(loss=name)
    assert callable(options.entry.advantages) and callable(options.reduction)


def test_flags_and_options_reach_the_loss():
    wide = GRPOOptions(loss="gspo", clip_eps=0.1, clip_eps_high=0.3)
    assert wide.terms()["gspo"].settings == {"clip_eps": 0.1, "clip_eps_high": 0.3}
    bound = GRPOOptions(loss="cispo:max_ratio=2").terms()["cispo"]
    assert bound.settings == {"max_ratio": 2.0}
    assert GRPOOptions(loss="0.5*grpo + gspo").terms()["grpo"].weight == 0.5
