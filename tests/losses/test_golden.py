"""jalign's losses against TRL's values, as scripts/make_golden.py has written them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jalign import losses

GOLDEN = Path(__file__).parent / "golden" / "trl.json"
BETA, LABEL_SMOOTHING, CLIP, CLIP_HIGH, LENGTH = 0.3, 0.1, 0.2, 0.28, 9


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
    logits, targets = inputs["logits"], inputs["targets"]
    return {
        "logps": losses.logps_from_logits(logits, targets),
        "entropy": losses.entropy_from_logits(logits),
        "cross_entropy": losses.cross_entropy(
            logits, targets, label_smoothing=LABEL_SMOOTHING
        ),
        **pair_values(inputs),
        **policy_values(inputs),
    }


def with_gradient(name, function, *arrays):
    argnums = tuple(range(len(arrays)))
    grads = jax.grad(lambda *x: function(*x).sum(), argnums)(*arrays)
    stacked = np.stack(grads, -1) if len(grads) > 1 else grads[0]
    return {name: function(*arrays), f"{name}_grad": stacked}


def pair_values(inputs):
    pair = inputs["chosen"], inputs["rejected"]
    refs = inputs["ref_chosen"], inputs["ref_rejected"]

    def dpo(chosen, rejected, eps=0.0):
        return losses.dpo_loss(chosen, rejected, *refs, beta=BETA, label_smoothing=eps)

    def bradley_terry(chosen, rejected):
        return losses.bradley_terry_loss(chosen, rejected, margin=inputs["margin"])

    center = losses.reward_center_loss(*pair)
    return {
        **with_gradient("dpo", dpo, *pair),
        **with_gradient("cdpo", lambda *x: dpo(*x, LABEL_SMOOTHING), *pair),
        **with_gradient("bradley_terry", bradley_terry, *pair),
        "bradley_terry_centered": bradley_terry(*pair) + 0.01 * center,
        "implicit_rewards": losses.implicit_rewards(pair[0], refs[0], beta=BETA),
    }


def policy_values(inputs):
    mask, clip = inputs["mask"], {"clip_eps": CLIP, "clip_eps_high": CLIP_HIGH}
    rest = inputs["old_logps"], inputs["advantages"]

    def policy(logps, reduction, beta, **options):
        loss = losses.ppo_policy_loss(logps, *rest, **clip)
        loss = loss + beta * losses.kl_k3(logps, inputs["ref_logps"])
        total, count = reduction(loss, mask, **options)
        return total / count

    values = {}
    for reduction, options in [
        (losses.token_mean, {}),
        (losses.sequence_mean, {}),
        (losses.fixed_length_mean, {"length": LENGTH}),
    ]:
        for beta in (0.0, BETA):
            name = f"policy_{'kl_' if beta else ''}{reduction.__name__}"
            values |= with_gradient(
                name,
                lambda x, r=reduction, b=beta, o=options: policy(x, r, b, **o),
                inputs["logps"],
            )
    clipped = losses.clip_frac(inputs["logps"], *rest, **clip)
    return values | {"clip_frac": losses.masked_mean(clipped, mask)}


@pytest.fixture(scope="module")
def both():
    inputs, golden = load()
    return jalign_values(inputs), golden


def assert_same(values, golden):
    assert set(values) == set(golden)
    for name, want in golden.items():
        np.testing.assert_allclose(
            values[name], want, rtol=2e-5, atol=2e-6, err_msg=name
        )


def test_values_and_gradients_are_those_of_trl(both):
    assert_same(*both)


def test_golden_file_is_small():
    assert GOLDEN.stat().st_size < 64_000
