"""jalign's preference losses against TRL's, as make_golden_preference.py wrote them.

Values are means over the batch, gradients are by token (or logit). What TRL names with
strings is put together here from functions: it doubles as a table of how.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses

GOLDEN = Path(__file__).parent / "golden" / "trl_preference.json"
BETA, EPS, TAU, F_ALPHA, LD_ALPHA = 0.3, 0.1, 0.7, 0.4, 0.35
GAMMA, SHAPE, NLL, SYNC = 0.4, 0.25, 0.6, 0.6
KTO_WEIGHTS = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
PAIRS, TIME = 4, 3
ALL = np.ones(PAIRS, bool)

partial = functools.partial
_BETA = {"beta": BETA}
_SMOOTHED = {"beta": BETA, "label_smoothing": EPS}
LOSSES = {
    "sigmoid": partial(losses.dpo_loss, **_BETA),
    "sigmoid_norm": partial(losses.dpo_loss, **_BETA),  # of averages over the tokens
    "hinge": partial(losses.hinge_loss, **_BETA),
    "ipo": partial(losses.ipo_loss, **_BETA),  # of averages over the tokens
    "exo_pair": partial(losses.exo_pair_loss, **_SMOOTHED),
    "robust": partial(losses.robust_dpo_loss, **_SMOOTHED),
    "discopop": partial(losses.discopop_loss, **_BETA, tau=TAU),
    "nca_pair": partial(losses.nca_pair_loss, **_BETA),
    "bco_pair": partial(losses.bco_pair_loss, **_BETA),
    "sppo_hard": partial(losses.sppo_hard_loss, **_BETA),
    "apo_zero": partial(losses.apo_zero_loss, **_BETA),
    "apo_down": partial(losses.apo_down_loss, **_BETA),
    "aot": lambda *x: losses.aot_loss(*x, np.ones(len(x[0]), bool), **_SMOOTHED),
    "aot_unpaired": lambda *x: losses.aot_unpaired_loss(
        *x, np.ones(len(x[0]), bool), **_SMOOTHED
    ),
}
AVERAGED = ("ipo", "sigmoid_norm")
SCORES = {
    "forward_kl": losses.forward_kl_score,
    "js_divergence": losses.js_score,
    "alpha_divergence": partial(losses.alpha_score, alpha=F_ALPHA),
}


def load():
    document = json.loads(GOLDEN.read_text())
    inputs = {k: np.array(v) for k, v in document["inputs"].items()}
    kinds = {"f": np.float32, "i": np.int32, "b": bool}
    inputs = {k: x.astype(kinds[x.dtype.kind]) for k, x in inputs.items()}
    return inputs, document["values"]


def jalign_values(inputs, names):
    """The values of these names (and of their gradients), computed here."""
    values = {}
    for name in names:
        function, x = function_of(inputs, name)
        # Not jitted: the operations are few and shared, their combinations many.
        value, vjp = jax.vjp(function, jnp.asarray(x))
        values[name] = value
        values[f"{name}_grad"] = vjp(jnp.ones_like(value))[0]
    return values


def function_of(inputs, name):
    """(function to the value called so, array by which TRL's gradient is taken)."""
    head = name.split("/")[0]
    if head in ("rpo", "mpo"):
        return partial(mixed, inputs, head), inputs["logps"]
    if head in ("kto", "apo_zero_unpaired"):
        return partial(kto, inputs, head, slice(None)), inputs["logps"]
    if head in ("cpo", "orpo", "tpo"):
        rows = slice(None if head == "tpo" else 2 * PAIRS)
        return partial(reference_free, inputs, name), inputs["logits"][rows]
    return partial(dpo, inputs, slice(None), name), inputs["logps"]


def dpo(inputs, rows, name, logps):
    """Mean loss of "kind/divergence/modifier", as TRL's options put it together."""
    kind, divergence, modifier, *_ = [*name.split("/"), "", ""]
    mask, ref = inputs["mask"][: 2 * PAIRS][rows], inputs["ref_logps"][rows]
    weights = jnp.ones(mask.shape, jnp.float32)
    if modifier == "ld":
        other = np.roll(mask, len(mask) // 2, axis=0)
        weights = losses.ld_weights(mask, other, alpha=LD_ALPHA)
    reduce = losses.sequence_logps
    if kind in AVERAGED and divergence == "reverse_kl":
        reduce = losses.average_logps
    policy, ref = (jnp.split(reduce(weights * x, mask), 2) for x in (logps, ref))
    if modifier == "reference_free":
        ref = [None, None] if divergence == "reverse_kl" else [0 * x for x in policy]
    if divergence in SCORES:
        # TRL divides by the length after the divergence, so this is not an average.
        score, n = SCORES[divergence], [1.0, 1.0]
        if kind in AVERAGED:
            n = np.split(mask.sum(1).astype(np.float32), 2)
        policy = [score(x, y) / m for x, y, m in zip(policy, ref, n, strict=True)]
        ref = [None, None]
    loss = LOSSES[kind](*policy, *ref)
    if modifier == "wpo":
        entropy = -inputs["log_sum_sq_probs"][rows]
        chosen, rejected = jnp.split(losses.wpo_weights(logps, entropy, mask), 2)
        loss = loss * chosen * rejected
    return loss.mean()


def nll(logps, mask):
    total, count = losses.token_mean(-logps, mask)
    return total / count


def mixed(inputs, name, logps):
    def pair(kind):
        return dpo(inputs, slice(None), f"{kind}/reverse_kl", logps)

    sft = nll(logps[:PAIRS], inputs["mask"][:PAIRS])
    if name == "rpo":
        return pair("sigmoid") + 0.5 * sft
    return 0.8 * pair("sigmoid") + 0.2 * pair("bco_pair") + sft


def kto(inputs, kind, rows, logps):
    mask = inputs["mask"][: 2 * PAIRS][rows]
    names = ("kl_logps", "kl_ref_logps", "ref_logps")
    x, y, ref = (losses.sequence_logps(inputs[k][rows], mask) for k in names)
    kl = losses.kto_kl(x, y, np.ones(len(x), bool)) if kind == "kto" else 0.0
    logps = losses.sequence_logps(logps, mask)
    good, scalars = inputs["desirable"][rows], {"kl": kl, **KTO_WEIGHTS}
    return losses.kto_loss(logps, ref, good, beta=BETA, **scalars).mean()


def reference_free(inputs, name, logits):
    rows = slice(len(logits))
    mask, ids = inputs["mask"][rows], inputs["ids"][rows]
    logps = losses.logps_from_logits(logits[:, :-1], ids[:, 1:])
    sums, averages = (
        losses.sequence_logps(logps, mask),
        losses.average_logps(logps, mask),
    )
    c, r = sums[:PAIRS], sums[PAIRS : 2 * PAIRS]
    avg_c, avg_r = averages[:PAIRS], averages[PAIRS : 2 * PAIRS]
    simpo = {**_SMOOTHED, "gamma": GAMMA}
    loss = {
        "sigmoid": lambda: losses.cpo_loss(c, r, **_SMOOTHED),
        "hinge": lambda: losses.hinge_loss(c, r, None, None, beta=BETA),
        "ipo": lambda: losses.ipo_loss(avg_c, avg_r, None, None, beta=BETA),
        "simpo": lambda: losses.simpo_loss(avg_c, avg_r, **simpo),
        "tpo-l": lambda: losses.simpo_loss(avg_c, avg_r, **simpo),
        "alphapo": lambda: losses.alphapo_loss(avg_c, avg_r, alpha=SHAPE, **simpo),
        "orpo": lambda: BETA * losses.orpo_loss(avg_c, avg_r),
    }[name.removesuffix("/nll").split("/")[-1]]().mean()
    gold = slice(2 * PAIRS, None) if name.startswith("tpo") else slice(PAIRS)
    if name == "orpo":
        loss = loss + nll(logps[gold], mask[gold])
    if name.endswith("/nll"):
        loss = loss + NLL * nll(logps[gold], mask[gold])
    return loss


@pytest.fixture(scope="module")
def golden():
    return load()


def assert_same(values, golden):
    for name, want in golden.items():
        got, want = np.asarray(values[name], np.float64), np.asarray(want)
        # 1e-5 of each entry, or of the largest where entries cancel.
        atol = 1e-5 * np.abs(want).max(initial=1.0, where=np.isfinite(want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=name)


def compared(golden):
    """Names of the values that have a gradient beside them."""
    return [name for name in golden if f"{name}_grad" in golden]


def test_values_and_gradients_are_those_of_trl(golden):
    inputs, values = golden
    names = compared(values)
    assert len(names) > 110
    assert_same(
        jalign_values(inputs, names),
        {k: values[k] for n in names for k in (n, f"{n}_grad")},
    )


def test_statistics_of_the_batch_are_of_all_of_it(golden):
    """In two micro-batches TRL gives other numbers; jalign gives them of each half."""
    inputs, values = golden
    halves = [np.r_[i : i + 2, PAIRS + i : PAIRS + i + 2] for i in (0, 2)]
    for kind in ("aot", "aot_unpaired", "sigmoid"):
        name = f"{kind}/reverse_kl"
        got = [dpo(inputs, h, name, inputs["logps"][h]) for h in halves]
        np.testing.assert_allclose(got, values[f"{kind}_in_halves"], rtol=1e-5)
        whole = values[name]
        assert np.isclose(np.mean(got), whole) == (kind == "sigmoid")
    got = [
        kto(inputs, "kto", h, inputs["logps"][h])
        for h in (slice(PAIRS), slice(PAIRS, 2 * PAIRS))
    ]
    np.testing.assert_allclose(got, values["kto_in_halves"], rtol=1e-5)
    assert abs(np.mean(got) - values["kto"]) > 0.01


def test_extremes_at_which_trl_overflows_stay_finite(golden):
    """Both numbers of the differences that docs/papers.md names."""
    _, values = golden

    def at(x):
        return np.float32([x])

    score = losses.forward_kl_score(at(-60.0), at(0.0))
    alphapo = {"alpha": 1.0, "gamma": 0.0, **_SMOOTHED}
    got = {
        "discopop": LOSSES["discopop"](at(-1e3), at(0.0), None, None),
        "forward_kl": losses.dpo_loss(score, at(0.0), None, None, beta=BETA),
        "orpo": BETA * losses.orpo_loss(at(-1.0), at(0.0)),
        "alphapo": losses.alphapo_loss(at(-1.0), at(-100.0), **alphapo),
    }
    ours = {"discopop": 300.0, "forward_kl": BETA * np.expm1(40.0)}
    ours["orpo"] = BETA * np.logaddexp(0, -np.log(1e-6) + np.log(np.e - 1))
    ours["alphapo"] = EPS * BETA * (np.exp(40.0) - np.e)
    trl = {"discopop": np.nan, "forward_kl": BETA * np.expm1(60.0)}
    trl |= {"orpo": np.inf, "alphapo": np.inf}
    for name, value in got.items():
        np.testing.assert_allclose(value, [ours[name]], rtol=1e-5, err_msg=name)
        theirs = values[f"extreme/{name}"]
        np.testing.assert_allclose(theirs, trl[name], rtol=1e-5, err_msg=name)


def test_the_moving_reference_and_the_collision_entropy_are_those_of_trl(golden):
    inputs, values = golden
    ref = losses.moving_reference(inputs["ref_params"], inputs["params"], alpha=SYNC)
    logits = inputs["hidden"] @ inputs["unembed"].T
    got = {
        "moving_reference": ref,
        "log_sum_sq_probs": -losses.collision_entropy_from_logits(logits),
    }
    assert_same(got, {k: values[k] for k in got})


def test_golden_file_is_small():
    assert GOLDEN.stat().st_size < 64_000
