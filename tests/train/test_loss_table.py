"""Tests for jalign/train/loss_table.py."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jalign.train.loss_spec import option_names, parse_losses
from jalign.train.loss_table import BOUNDS, REGISTRY
from jalign.train.online_config import GRPOOptions, SampleConfig
from tests.losses import test_golden_policy as trl
from tests.losses.oracle import numeric_gradient
from tests.losses.pairs import logistic, sigmoid

DOCS = Path(__file__).resolve().parents[2] / "docs"
POLICY_PAGE = (DOCS / "policy_gradients.md").read_text(encoding="utf-8")

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


def against_its_rank(x, y):
    return x - np.sort(y)[np.argsort(np.argsort(x))]


def log_odds(x):
    return x - np.log1p(-np.exp(x))


def box_cox(x, alpha):
    return (1 - np.exp(x) ** -alpha) / alpha


def preference_losses(c, r, ref_c, ref_r, mean_c, mean_r, mean_ref_c, mean_ref_r):
    """name -> float64 losses at the defaults: β = 0.1, 2 for SimPO's; AlphaPO's α 0.25.

    A new loss has its formula here: value and gradient are held to it.
    """
    w, l = c - ref_c, r - ref_r
    z = 0.1 * (w - l)
    won, lost = sigmoid(z), sigmoid(-z)
    mean_margin = mean_c - mean_ref_c - mean_r + mean_ref_r
    alpha_margin = box_cox(mean_c, 0.25) - box_cox(mean_r, 0.25)
    return {
        "sft": -mean_c,
        "dpo": logistic(z),
        "sigmoid_norm": logistic(0.1 * mean_margin),
        "ipo": (mean_margin - 5) ** 2,
        "ipo_sum": (w - l - 5) ** 2,
        "hinge": np.maximum(1 - z, 0),
        "robust": logistic(z),
        "exo_pair": won * np.log(won / 0.999) + lost * np.log(lost / 1e-3),
        "discopop": sigmoid(-20 * z) * logistic(z) + sigmoid(20 * z) * np.exp(-z),
        "nca_pair": logistic(0.1 * w) + (logistic(-0.1 * w) + logistic(-0.1 * l)) / 2,
        "bco_pair": logistic(0.1 * w) + logistic(-0.1 * l),
        "sppo_hard": (w - 5) ** 2 + (l + 5) ** 2,
        "dpop": logistic(z - 0.1 * 50 * np.maximum(-w, 0)),
        "apo_zero": sigmoid(-0.1 * w) + sigmoid(0.1 * l),
        "apo_down": sigmoid(0.1 * w) + sigmoid(-z),
        "aot": logistic(0.1 * against_its_rank(c - r, ref_c - ref_r)),
        "aot_unpaired": logistic(0.1 * against_its_rank(w, l)),
        "cpo": logistic(0.1 * (c - r)),
        "simpo": logistic(2 * (mean_c - mean_r) - 0.5),
        "alphapo": logistic(2 * alpha_margin - 0.5),
        "orpo": logistic(log_odds(mean_c) - log_odds(mean_r)),
    }


POLICY_DEFAULTS = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "bnpo", "rloo"), {"clip_eps": 0.2}),
    **dict.fromkeys(("gspo", "luspo"), {"clip_eps": 3e-4, "clip_eps_high": 4e-4}),
    "cispo": {"max_ratio": 5.0},
}
"""name -> scalars: PPO's ε, GSPO's (arXiv:2507.18071, §5.1), ScaleRL's (2510.13786);
the others leave theirs to the function."""
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


def test_preference_losses_have_the_values_and_gradients_of_the_field_by_default():
    names, weights = list(LOGPS), np.cos(np.arange(3.0))
    arrays = tuple(LOGPS.values())
    wanted = preference_losses(*arrays)
    assert set(wanted) == set(REGISTRY["dpo"])

    def losses(given):
        given = given | {"mask": np.ones(3, bool)}
        spec = " + ".join(wanted).replace("alphapo", "alphapo:alpha=0.25")
        terms = parse_losses(spec, REGISTRY["dpo"])
        return {name: term(given) for name, term in terms.items()}

    def vjps(given):
        out, pull = jax.vjp(losses, given)
        zero = {name: np.zeros(3, "f4") for name in out}
        one = {name: zero | {name: weights.astype("f4")} for name in out}
        return out, {name: pull(cotangent)[0] for name, cotangent in one.items()}

    given = {name: x.astype("f4") for name, x in LOGPS.items()}
    values, gradients = jax.jit(vjps)(given)
    for name, want in wanted.items():
        np.testing.assert_allclose(values[name], want, rtol=1e-5, err_msg=name)
        for i, array in enumerate(names):
            got = gradients[name][array]
            if "ref" in array:
                assert not np.any(got), (name, array)
                continue
            slope = numeric_gradient(
                lambda *x, name=name: preference_losses(*x)[name], arrays, i, weights
            )
            said = f"{name}: {array}"
            np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5, err_msg=said)


OPTIONS = [
    (command, name, option)
    for command, name, entry in ROWS
    for option in sorted(option_names(entry.function) - set(entry.keywords))
]


def bounds_of(command, name, option):
    return REGISTRY[command][name].bounds.get(option) or BOUNDS[option]


def test_every_option_has_bounds_and_they_are_those_of_its_docstring():
    """`()` in BOUNDS is any number; a docstring may say less than the table."""
    assert {option for *_, option in OPTIONS} == set(BOUNDS)
    number, said = r"-?[\d.]+", []
    for command, name, option in OPTIONS:
        function = REGISTRY[command][name].function
        text = inspect.getdoc(function) or ""
        line = re.search(rf"^ +[\w, ]*\b{option}\b[\w, ]*: .*", text, re.M)
        if line is None:
            continue
        interval = re.search(rf"in ([\[(])({number}), ({number})([\])])", line[0])
        one = re.search(rf"(>=?) ({number})", line[0])
        if interval:
            left, low, high, right = interval.groups()
            want = (f">{'=' * (left == '[')} {low}", f"<{'=' * (right == ']')} {high}")
        elif one:
            want = (f"{one[1]} {one[2].rstrip('.')}",)
        else:
            continue
        said.append(option)
        got = bounds_of(command, name, option)
        assert got[: len(want)] == want, (command, name, option)
    assert len(said) > 40


@pytest.mark.parametrize(("command", "name", "option"), OPTIONS)
def test_a_value_just_outside_its_bounds_is_refused(command, name, option):
    """The bound itself, or a little beyond where it is allowed; well within, taken."""
    needed = {"alpha": 0.25} if name == "alphapo" and option != "alpha" else {}

    def parse(value):
        options = needed | {option: value}
        text = ",".join(f"{k}={v}" for k, v in options.items())
        return parse_losses(f"{name}:{text}", REGISTRY[command])[name]

    bounds = bounds_of(command, name, option)
    for sign, edge in map(str.split, bounds):
        beyond = 1e-6 if sign == "<=" else -1e-6 if sign == ">=" else 0.0
        with pytest.raises(ValueError, match=rf"^{option} must be .*loss '{name}'"):
            parse(float(edge) + beyond)
    low, high = ([float(bound.split()[1]) for bound in bounds] + [None, None])[:2]
    inside = -3.0 if low is None else low + 2 if high is None else (low + high) / 2
    assert parse(inside).options[option] == inside


def test_reward_losses_and_the_margin_of_the_row():
    chosen, rejected = np.float32([2.0, -1.0]), np.float32([0.5, 3.0])
    entry, margin = REGISTRY["reward"]["bradley_terry"], np.float32([1.0, 0.0])
    assert entry.keywords == ("margin",)
    got = entry.function(chosen, rejected, **{entry.keywords[0]: margin})
    np.testing.assert_allclose(got, logistic(np.array([0.5, -4.0])), rtol=1e-5)
    got = REGISTRY["reward"]["center"].function(chosen, rejected)
    np.testing.assert_allclose(got, [2.5**2, 2.0**2], rtol=1e-6)


def test_policy_losses_have_the_bounds_of_their_papers_by_default():
    table = REGISTRY["grpo"].items()
    got = {name: entry.defaults for name, entry in table if entry.defaults}
    assert got == POLICY_DEFAULTS


def test_rewards_are_scaled_but_for_dr_grpo_and_left_out_in_turn_for_rloo():
    rewards, ids = np.float32([1.0, 2.0, 6.0]), np.zeros(3, "i4")
    centered = rewards.astype("f8") - 3
    others = {"dr_grpo": centered, "rloo": rewards - np.array([4.0, 3.5, 1.5])}
    others["opo"] = rewards - (3 * 1 + 1 * 2 + 2 * 6) / 6
    arrays = {"rewards": rewards, "group_ids": ids, "mask": np.ones(3, bool)}
    arrays["completion_mask"] = np.arange(3) < np.array([[3], [1], [2]])
    scaled = centered / (np.std(rewards.astype("f8"), ddof=1) + 1e-4)
    for name, entry in REGISTRY["grpo"].items():
        got = entry.advantages(*(arrays[x] for x in entry.advantage_inputs))
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


X = np.float32([[1.0, 2.0, 3.0, 9.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
COUNTED = np.arange(4) < np.array([[3], [1], [0]])  # the last is filler
AVERAGED = {
    "sequences": (2 + 5) / 2,
    "tokens": (1 + 2 + 3 + 5) / 4,
    "sequences, weighted by length": (6 + 5) / 2,
    "max-new-tokens a sequence": (6 + 5) / (2 * 6),
}


@pytest.mark.parametrize("name", REGISTRY["grpo"])
def test_a_policy_loss_is_averaged_as_the_table_of_the_docs_says(name):
    rows = [line.split("|") for line in POLICY_PAGE.splitlines() if line[:1] == "|"]
    (said,) = (row[3].strip() for row in rows if f"`{name}`" in row[1] and len(row) > 5)
    way = max((way for way in AVERAGED if said.startswith(way)), key=len)
    sampling = SampleConfig(max_new_tokens=6)
    total, count = GRPOOptions(loss=name, sampling=sampling).reduction(X, COUNTED)
    assert total / count == pytest.approx(AVERAGED[way], rel=1e-6)


GOLDEN_INPUTS, GOLDEN = trl.load()


@pytest.mark.parametrize("name", sorted(set(REGISTRY["grpo"]) & set(GOLDEN)))
def test_a_policy_loss_with_its_reduction_is_trls(name):
    """Value and gradient, of each that TRL has too."""
    inputs, golden = GOLDEN_INPUTS, GOLDEN
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
