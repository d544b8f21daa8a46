"""Tests for jalign/train/loss_table.py."""

import inspect

import jax
import numpy as np
import pytest

from jalign.train.loss_table import REGISTRY
from tests.losses import test_golden_policy as trl
from tests.losses.pairs import log_sigmoid, logistic, sigmoid

# Log-probabilities of three pairs: by what is summed or averaged, under either model.
LOGPS = {
    "chosen_logps": [-9.0, -14.0, -8.5],
    "rejected_logps": [-7.0, -30.5, -2.0],
    "ref_chosen_logps": [-11.0, -5.0, -6.0],
    "ref_rejected_logps": [-7.5, -21.0, -9.0],
    "average_chosen_logps": [-0.9, -1.25, -0.5],
    "average_rejected_logps": [-0.7, -3.5, -0.25],
    "average_ref_chosen_logps": [-1.0, -1.0, -0.125],
    "average_ref_rejected_logps": [-0.5, -2.0, -0.75],
}
LOGPS = {name: np.array(x) for name, x in LOGPS.items()}
C, R, REF_C, REF_R, MEAN_C, MEAN_R, MEAN_REF_C, MEAN_REF_R = LOGPS.values()
W, L = C - REF_C, R - REF_R
Z = 0.1 * (W - L)  # at the β of the field's trainers
MEAN_MARGIN = MEAN_C - MEAN_REF_C - MEAN_R + MEAN_REF_R


def against_its_rank(x, y):
    return x - np.sort(y)[np.argsort(np.argsort(x))]


def exo(eps):
    won = sigmoid(Z) * (log_sigmoid(Z) - np.log(1 - eps))
    return won + sigmoid(-Z) * (log_sigmoid(-Z) - np.log(eps))


def log_odds(x):
    return x - np.log1p(-np.exp(x))


def box_cox(x, alpha):
    return (1 - np.exp(x) ** -alpha) / alpha


PREFERENCE = {
    "sft": -MEAN_C,
    "dpo": logistic(Z),
    "sigmoid_norm": logistic(0.1 * MEAN_MARGIN),
    "ipo": (MEAN_MARGIN - 5) ** 2,
    "ipo_sum": (W - L - 5) ** 2,
    "hinge": np.maximum(1 - Z, 0),
    "robust": logistic(Z),
    "exo_pair": exo(1e-3),
    "discopop": sigmoid(-20 * Z) * logistic(Z) + sigmoid(20 * Z) * np.exp(-Z),
    "nca_pair": logistic(0.1 * W) + (logistic(-0.1 * W) + logistic(-0.1 * L)) / 2,
    "bco_pair": logistic(0.1 * W) + logistic(-0.1 * L),
    "sppo_hard": (W - 5) ** 2 + (L + 5) ** 2,
    "dpop": logistic(Z - 0.1 * 50 * np.maximum(-W, 0)),
    "apo_zero": sigmoid(-0.1 * W) + sigmoid(0.1 * L),
    "apo_down": sigmoid(0.1 * W) + sigmoid(-Z),
    "aot": logistic(0.1 * against_its_rank(C - R, REF_C - REF_R)),
    "aot_unpaired": logistic(0.1 * against_its_rank(W, L)),
    "cpo": logistic(0.1 * (C - R)),
    "simpo": logistic(2 * (MEAN_C - MEAN_R) - 0.5),
    "alphapo": logistic(2 * (box_cox(MEAN_C, 0.25) - box_cox(MEAN_R, 0.25)) - 0.5),
    "orpo": logistic(log_odds(MEAN_C) - log_odds(MEAN_R)),
}
"""name -> losses at the defaults: β = 0.1, but 2 for SimPO's kind; AlphaPO's α 0.25."""
POLICY_DEFAULTS = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "bnpo", "rloo"), {"clip_eps": 0.2}),
    **dict.fromkeys(("gspo", "luspo"), {"clip_eps": 3e-4, "clip_eps_high": 4e-4}),
    **dict.fromkeys(("gmpo", "sapo", "vespo", "reinforce", "opo"), {}),
    "cispo": {"max_ratio": 5.0},
}
"""name -> scalars: PPO's ε, GSPO's (arXiv:2507.18071, §5.1), ScaleRL's (2510.13786)."""
ROWS = [(c, name, e) for c, table in REGISTRY.items() for name, e in table.items()]


@pytest.mark.parametrize(("command", "name", "entry"), ROWS)
def test_an_entry_fits_its_function(command, name, entry):
    parameters = inspect.signature(entry.function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    scalars = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert set(entry.defaults) | set(entry.keywords) <= scalars
    # Averages stand where the function's docstring asks for averages or any score.
    names = [i.replace("average_", "") for i in entry.inputs]
    assert len(names) == len(positional)
    if name != "sft":
        assert names == positional


def test_preference_losses_have_the_values_of_the_field_by_default():
    assert set(PREFERENCE) == set(REGISTRY["dpo"])
    arrays = {name: x.astype("f4") for name, x in LOGPS.items()}
    arrays["mask"] = np.ones(3, bool)
    for name, want in PREFERENCE.items():
        entry = REGISTRY["dpo"][name]
        options = {"alpha": 0.25} if name == "alphapo" else {}
        options |= entry.defaults
        got = entry.function(*(arrays[i] for i in entry.inputs), **options)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


def test_reward_losses_and_the_margin_of_the_row():
    chosen, rejected = np.float32([2.0, -1.0]), np.float32([0.5, 3.0])
    entry, margin = REGISTRY["reward"]["bradley_terry"], np.float32([1.0, 0.0])
    assert entry.keywords == ("margin",)
    got = entry.function(chosen, rejected, **{entry.keywords[0]: margin})
    np.testing.assert_allclose(got, logistic(np.array([0.5, -4.0])), rtol=1e-5)
    got = REGISTRY["reward"]["center"].function(chosen, rejected)
    np.testing.assert_allclose(got, [2.5**2, 2.0**2], rtol=1e-6)


def test_policy_losses_have_the_bounds_of_their_papers_by_default():
    got = {name: dict(entry.defaults) for name, entry in REGISTRY["grpo"].items()}
    assert got == POLICY_DEFAULTS


def test_rewards_are_scaled_but_for_dr_grpo_and_left_out_in_turn_for_rloo():
    rewards, ids = np.float32([1.0, 2.0, 6.0]), np.zeros(3, "i4")
    centered = rewards.astype("f8") - 3
    others = {"dr_grpo": centered, "rloo": rewards - np.array([4.0, 3.5, 1.5])}
    others["opo"] = rewards - (3 * 1 + 1 * 2 + 2 * 6) / 6
    tokens = np.arange(3) < np.array([[3], [1], [2]])
    scaled = centered / (np.std(rewards.astype("f8"), ddof=1) + 1e-4)
    for name, entry in REGISTRY["grpo"].items():
        mask = tokens if entry.token_mask else np.ones(3, bool)
        got = entry.advantages(rewards, ids, mask)
        want = others.get(name, scaled)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


def test_rloo_reads_and_writes_only_what_counts():
    mask = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    nan = np.float32(np.nan)
    old = np.where(mask, np.float32([[-1.0], [-2.0], [-3.0]]), nan)
    shift = np.float32([[0.05, 0.05, 0.05], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    advantages = np.where(mask, np.float32([[3.0], [2.0], [9.0]]), nan)
    entry = REGISTRY["grpo"]["rloo"]
    got = entry.function(old + shift, old, advantages, mask, **entry.defaults)
    want = mask * np.array([[-3 * np.exp(0.1)], [-2 * 1.2], [0.0]])  # the second cut
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_loss_that_sorts_the_batch_says_so():
    for command, name, entry in ROWS:
        reads_rows = "mask" in entry.inputs and command != "grpo"  # there of tokens
        assert entry.whole_batch == reads_rows, (command, name)


def test_policy_losses_alone_say_how_they_are_averaged():
    for command, name, entry in ROWS:
        said = (entry.advantages is not None, entry.reduction is not None)
        assert said == (command == "grpo",) * 2, (command, name)


@pytest.mark.parametrize("name", sorted(set(REGISTRY["grpo"]) - {"reinforce", "opo"}))
def test_a_policy_loss_with_its_reduction_is_trls(name):
    """Value and gradient; reinforce and opo are no losses of TRL's."""
    inputs, golden = trl.load()
    entry, mask = REGISTRY["grpo"][name], inputs["mask"]
    per_token = np.where(mask, inputs["advantages"][:, None], np.float32(0))
    arrays = inputs | {"advantages": per_token}
    options = dict(entry.defaults)
    if "clip_eps" in options:
        options |= trl.CLIP
    own = {"cispo": {"max_ratio": 1.6}, "gmpo": {"clip_eps": 0.4, "clip_eps_high": 0.3}}
    options |= own.get(name, {})
    length = {"length": trl.LENGTH} if name == "dr_grpo" else {}

    def mean(logps):
        given = arrays | {"logps": logps}
        loss = entry.function(*(given[k] for k in entry.inputs), **options)
        total, count = entry.reduction(loss, mask, **length)
        return total / count

    value, grad = jax.jit(jax.value_and_grad(mean))(inputs["logps"])
    np.testing.assert_allclose(value, golden[name], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(grad, golden[f"{name}_grad"], rtol=1e-5, atol=2e-6)
