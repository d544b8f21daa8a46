"""jalign's policy losses against TRL's values (scripts/make_golden_policy.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses

GOLDEN = Path(__file__).parent / "golden" / "trl_policy.json"
BETA, LENGTH, COEF, THRESHOLD, TEMPERATURE, SOFTCAP = 0.3, 9, 0.05, 0.01, 0.8, 2.5
CLIP = {"clip_eps": 0.2, "clip_eps_high": 0.28}
BOUNDS = {"min_ratio": 0.7, "max_ratio": 1.6}
WEIGHTS = np.float32([1.0, 0.5])
GROUP_IDS = np.int32([0, 0, 0, 1, 1, 1])


def load():
    document = json.loads(GOLDEN.read_text())
    inputs = {k: np.array(v) for k, v in document["inputs"].items()}
    for name, x in inputs.items():
        if x.dtype == np.float64:
            inputs[name] = x.astype(np.float32)
    inputs["targets"] = inputs["targets"].astype(np.int32)
    return inputs, document["values"]


def jalign_values(inputs):
    """The same names as in the golden file, computed here."""
    return {
        **policy_values(inputs),
        **advantage_values(inputs),
        **sampler_values(inputs),
        **divergence_values(inputs),
        **sft_values(inputs),
    }


def divided(reduction, loss, mask, **options):
    total, count = reduction(loss, mask, **options)
    return total / count


def policy_recipes(inputs):
    """Name -> a function of logps [B, T]: each algorithm as it is put together."""
    old, ref, mask = inputs["old_logps"], inputs["ref_logps"], inputs["mask"]
    per_token = np.broadcast_to(inputs["advantages"][:, None], mask.shape)
    ppo_args, sequence_args = (old, per_token), (old, per_token, mask)
    token, sequence = losses.token_mean, losses.sequence_mean

    def ppo(logps, **options):
        return losses.ppo_policy_loss(logps, *ppo_args, **CLIP, **options)

    def gspo(logps):
        return losses.gspo_loss(logps, *sequence_args, **CLIP)

    def gmpo(logps):
        return losses.gmpo_loss(logps, *sequence_args, clip_eps=0.4, clip_eps_high=0.3)

    def vespo(logps, old=old):
        return losses.vespo_loss(logps, old, per_token, mask)

    def kl(logps):
        return BETA * losses.kl_k3(logps, ref)

    def rloo(logps):
        sums = (losses.sequence_logps(x, mask) for x in (logps, old))
        loss = losses.rloo_loss(*sums, inputs["advantages"], **CLIP)
        return divided(token, loss, np.ones(len(mask), bool))

    def off_policy(logps):
        kept = losses.off_policy_mask(
            logps, inputs["sampler_logps"], per_token, mask, threshold=THRESHOLD
        )
        return kept * ppo(logps)

    def reduced(reduction, loss, **options):
        return lambda logps: divided(reduction, loss(logps), mask, **options)

    return {
        "grpo": reduced(sequence, ppo),
        "grpo_kl": reduced(sequence, lambda x: ppo(x) + kl(x)),
        "grpo_unbiased_kl": reduced(
            sequence, lambda x: ppo(x) + jnp.exp(x - old) * kl(x)
        ),
        "grpo_delta": reduced(sequence, lambda x: ppo(x, dual_clip=1.5)),
        "bnpo": reduced(token, ppo),
        "dapo": reduced(token, ppo),
        "dr_grpo": reduced(losses.fixed_length_mean, ppo, length=LENGTH),
        "gspo": reduced(sequence, gspo),
        "gspo_dapo": reduced(token, gspo),
        "luspo": reduced(losses.sequence_sum_mean, gspo),
        "cispo": reduced(
            token, lambda x: losses.cispo_loss(x, *ppo_args, max_ratio=1.6)
        ),
        "sapo": reduced(sequence, lambda x: losses.sapo_loss(x, *ppo_args)),
        "vespo": reduced(token, vespo),
        "vespo_kl": reduced(token, lambda x: vespo(x) + kl(x)),
        "vespo_sampler": reduced(token, lambda x: vespo(x, inputs["sampler_logps"])),
        "bnpo_entropy": reduced(token, lambda x: ppo(x) - COEF * inputs["entropies"]),
        "grpo_off_policy_mask": reduced(sequence, off_policy),
        "gmpo": reduced(sequence, gmpo),
        "gmpo_kl": reduced(sequence, lambda x: gmpo(x) + kl(x)),
        "rloo": rloo,
    } | {
        f"grpo_{mode}": reduced(sequence, lambda x, w=w: w * ppo(x) + kl(x))
        for mode, w in importance_weights(inputs).items()
    }


def importance_weights(inputs):
    pair = inputs["old_logps"], inputs["sampler_logps"]
    mask = inputs["mask"]
    return {
        "token_truncate": losses.truncated_importance_weights(*pair, **BOUNDS),
        "token_mask": losses.masked_importance_weights(*pair, **BOUNDS),
        "sequence_truncate": losses.sequence_truncated_importance_weights(
            *pair, mask, **BOUNDS
        ),
        "sequence_mask": losses.sequence_masked_importance_weights(
            *pair, mask, **BOUNDS
        ),
    }


def policy_values(inputs):
    recipes = policy_recipes(inputs)

    @jax.jit
    def everything(logps):
        return {k: jax.value_and_grad(f)(logps) for k, f in recipes.items()}

    values = {}
    for name, (value, grad) in everything(inputs["logps"]).items():
        values |= {name: value, f"{name}_grad": grad}
    return values


def advantage_values(inputs):
    applies = ~np.isnan(inputs["rewards"])
    scored, ids = applies.any(1), GROUP_IDS
    rewards = np.where(applies, inputs["rewards"] * WEIGHTS, 0).sum(1)
    centered = losses.group_advantages(rewards, ids, scored, scale_by_std=False)
    std = jnp.sqrt(losses.masked_var(rewards, scored))
    kl = losses.kl_k1(inputs["old_logps"], inputs["ref_logps"])
    kl = losses.sequence_logps(kl, inputs["mask"])
    rloo = losses.leave_one_out_advantages(rewards, ids, scored)
    rloo_std = jnp.sqrt(losses.masked_var(rloo, scored))
    rloo_mean = losses.masked_mean(rloo, scored)
    return {
        "advantages_group": losses.group_advantages(rewards, ids, scored),
        "advantages_none": centered,
        "advantages_batch": centered / (std + 1e-4),
        "advantages_gdpo": losses.gdpo_advantages(
            inputs["rewards"], WEIGHTS, ids, applies
        ),
        "advantages_rloo": rloo,
        "advantages_rloo_kl": losses.leave_one_out_advantages(
            rewards - BETA * kl, ids, scored
        ),
        "advantages_rloo_normalized": scored * (rloo - rloo_mean) / (rloo_std + 1e-4),
    }


def sampler_values(inputs):
    """TRL leaves weights at uncounted places that then meet the mask."""
    return {f"weights_{k}": w for k, w in importance_weights(inputs).items()}


def divergence_values(inputs):
    pair = inputs["logits"], inputs["ref_logits"]
    heads = [inputs[k] for k in ("hidden", "unembed", "ref_hidden", "ref_unembed")]
    mask = inputs["token_mask"]
    caps = {"temperature": TEMPERATURE, "softcap": SOFTCAP}

    def total(hidden, unembed, beta):
        loss = losses.token_jsd(
            hidden, unembed, *heads[2:], beta=beta, ref_softcap=SOFTCAP, **caps
        )
        return divided(losses.token_mean, loss, mask)

    def on_logits(logits, beta):
        loss = losses.jsd_from_logits(
            logits, pair[1], beta=beta, temperature=TEMPERATURE
        )
        return loss.sum(), loss

    by_head = jax.jit(jax.value_and_grad(total, (0, 1)))
    by_logits = jax.jit(jax.grad(on_logits, has_aux=True))
    values = {}
    for beta in (0.0, 0.3, 1.0):
        values[f"jsd_{beta}_grad"], values[f"jsd_{beta}"] = by_logits(pair[0], beta)
        name = f"token_jsd_{beta}"
        values[name], grads = by_head(*heads[:2], beta)
        values[f"{name}_grad_hidden"], values[f"{name}_grad_unembed"] = grads
    entropy = losses.token_entropy(*heads[:2], **caps)
    return values | {"token_entropy_sum": losses.token_mean(entropy, mask)[0]}


def sft_values(inputs):
    def dft(logps):
        loss = losses.dft_loss(logps)
        return divided(losses.token_mean, loss, inputs["token_mask"])

    value, grad = jax.value_and_grad(dft)(inputs["logps"][:2, :3])
    heads = inputs["hidden"], inputs["unembed"], inputs["targets"]
    accuracy = losses.token_accuracy(*heads)
    return {"dft": value, "dft_grad": grad, "accuracy": accuracy}


DIFFERENT = {
    "bnpo_of_two_microbatches",
    "grpo_with_an_empty_row",
    "dr_grpo_with_an_empty_row",
    "far_ratio_gradient_is_finite",
    "advantages_of_equal_rewards",
}
"""Values of TRL that jalign does not share; each has a test below."""


@pytest.fixture(scope="module")
def both():
    inputs, golden = load()
    return inputs, jalign_values(inputs), golden


def assert_same(values, golden, mask):
    assert set(values) | DIFFERENT == set(golden)
    for name, want in golden.items():
        if name in DIFFERENT:
            continue
        got = np.asarray(values[name])
        if name.startswith("weights_"):
            got, want = (np.where(mask, x, 0) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6, err_msg=name)


def test_values_and_gradients_are_those_of_trl(both):
    inputs, values, golden = both
    assert_same(values, golden, inputs["mask"])


def test_the_golden_values_tell_the_variants_apart(both):
    golden = both[2]
    names = set(policy_recipes(both[0])) - {"dapo"}  # TRL's bnpo of one micro-batch
    assert len({golden[name] for name in names}) == len(names)


def test_token_mean_is_global_where_bnpo_is_of_the_microbatch(both):
    inputs, values, golden = both
    local = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        part = {k: v[rows] for k, v in inputs.items() if k != "unembed"}
        local += policy_recipes(part)["bnpo"](part["logps"]) / 2
    np.testing.assert_allclose(local, golden["bnpo_of_two_microbatches"], rtol=1e-5)
    assert abs(values["bnpo"] - local) > 1e-3


def test_rows_without_a_token_do_not_count_where_trl_counts_them(both):
    inputs, _, golden = both
    empty = dict(inputs, mask=inputs["mask"] & (np.arange(6) != 5)[:, None])
    recipes = policy_recipes(empty)
    for ours, theirs in [
        (recipes["grpo"], "grpo_with_an_empty_row"),
        (recipes["dr_grpo"], "dr_grpo_with_an_empty_row"),
    ]:
        value = ours(inputs["logps"])
        np.testing.assert_allclose(value * 5 / 6, golden[theirs], rtol=1e-5)


def test_a_ratio_far_away_has_a_finite_gradient_where_trl_has_none(both):
    inputs, _, golden = both
    far = inputs["logps"].copy()
    far[0, 0] = inputs["old_logps"][0, 0] + 100
    grad = jax.grad(policy_recipes(inputs)["grpo"])(far)
    assert golden["far_ratio_gradient_is_finite"] == 0 and np.all(np.isfinite(grad))


def test_equal_rewards_give_zero_where_trl_scales_up_rounding(both):
    rewards, every = np.full(6, 9e4 / 7, "f4"), np.ones(6, bool)
    got = losses.group_advantages(rewards, GROUP_IDS, every)
    np.testing.assert_array_equal(got, np.zeros(6))
    assert np.max(np.abs(both[2]["advantages_of_equal_rewards"])) > 0.5


def test_golden_file_is_small():
    assert GOLDEN.stat().st_size < 64_000
