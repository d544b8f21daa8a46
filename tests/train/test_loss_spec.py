"""Tests for jalign/train/loss_spec.py."""

import jax.numpy as jnp
import pytest

from jalign import losses
from jalign.train.loss_spec import parse_losses
from jalign.train.loss_table import REGISTRY

DPO = REGISTRY["dpo"]
INPUTS = {
    name: jnp.array([-2.0, -3.0]) * (i + 1)
    for i, name in enumerate(
        ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    )
}


def test_a_name_alone_has_the_defaults():
    term = parse_losses("dpo", DPO)["dpo"]
    assert (term.weight, term.name, term.options) == (1.0, "dpo", {})
    want = losses.dpo_loss(*INPUTS.values(), beta=0.1)
    assert jnp.array_equal(term(INPUTS), want)


def test_weights_and_options():
    dpo, sft = parse_losses("dpo:beta=1e+1,label_smoothing=.1 + 0.2*sft", DPO).values()
    assert dpo.settings == {"beta": 10.0, "label_smoothing": 0.1}
    assert (sft.weight, sft.name) == (0.2, "sft")
    want = losses.dpo_loss(*INPUTS.values(), beta=10.0, label_smoothing=0.1)
    assert jnp.array_equal(dpo(INPUTS), want)
    (negative,) = parse_losses("-1*dpo", DPO).values()
    assert negative.weight == -1.0


def test_a_name_that_ends_like_a_number_is_cut_rightly():
    assert list(parse_losses("hinge+sft", DPO)) == ["hinge", "sft"]


def test_flags_are_options_of_the_losses_that_have_them():
    dpo, sft = parse_losses(
        "dpo + sft", DPO, {"beta": 0.5, "label_smoothing": None}
    ).values()
    assert dpo.settings == {"beta": 0.5} and sft.settings == {}
    (own,) = parse_losses("dpo:beta=2", DPO, {"beta": 0.5}).values()
    assert own.settings == {"beta": 2.0}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("hing", {}, "'hing' is not one of .*did you mean 'hinge'"),
        ("kto", {}, "'kto' is not one of"),
        ("dpo:gamma=1", {}, "no option 'gamma'; it has: beta, label_smoothing"),
        ("dpo:beta=big", {}, "dpo:beta='big' is not a number"),
        ("dpo +", {}, "expected .* at ''"),
        ("", {}, "expected"),
        ("dpo sft", {}, "expected \\+ or the end at 'sft'"),
        ("dpo + 2*dpo", {}, "'dpo' occurs twice"),
        ("alphapo", {}, "'alphapo' needs alpha: alphapo:alpha=NUMBER"),
        ("sft", {"beta": 0.1}, "beta is set, but no loss of 'sft' has it"),
    ],
)
def test_what_cannot_be_used_is_named(text, flags, message):
    with pytest.raises(ValueError, match=message):
        parse_losses(text, DPO, flags)
