"""Writes tests/losses/golden/trl_preference.json: TRL's preference losses.

TRL's own loss code runs on given log-probabilities or logits; a stub stands in for the
trainer and the model around it. Every value is TRL's mean over the batch; its gradient
is by token, so that it tells pairs and tokens apart. Run in an environment with torch
2.13.0 and trl 1.16.0:

    python scripts/make_golden_preference.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PATH = Path(__file__).resolve().parents[1] / "tests" / "losses" / "golden"
PATH = PATH / "trl_preference.json"
BETA, EPS, TAU, F_ALPHA, LD_ALPHA = 0.3, 0.1, 0.7, 0.4, 0.35
GAMMA, SHAPE, NLL, SYNC = 0.4, 0.25, 0.6, 0.6  # SHAPE: AlphaPO's α
KTO_WEIGHTS = (1.2, 0.8)
PAIRS, TIME, VOCAB = 4, 3, 5
# Losses that see the f-divergence's scores, and those that TRL keeps to log-ratios.
SCORED = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
RAW = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
RAW += ["apo_zero", "apo_down"]
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
MIXES = {
    "rpo": (["sigmoid", "sft"], [1.0, 0.5]),
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
}


def make_inputs() -> dict[str, np.ndarray]:
    """Small arrays, the same on every machine, rounded so that JSON stays readable.

    Rows are the chosen completions, then the rejected ones (then TPO's gold ones).
    """
    rng = np.random.default_rng(0)
    lengths = np.array([3, 1, 2, 3, 2, 3, 3, 1, 3, 2, 3, 1])
    rows = (2 * PAIRS, TIME)
    floats = {
        "logps": -3 * rng.random(rows),
        "ref_logps": -3 * rng.random(rows),
        "log_sum_sq_probs": -rng.random(rows),
        "kl_logps": -2 * rng.random(rows),
        "kl_ref_logps": -3 * rng.random(rows),
        "logits": 2 * rng.normal(size=(3 * PAIRS, TIME + 1, VOCAB)),
        "hidden": rng.normal(size=(4, 3)),
        "unembed": rng.normal(size=(VOCAB, 3)),
        "params": rng.normal(size=(2, 3)),
        "ref_params": rng.normal(size=(2, 3)),
    }
    inputs = {k: np.round(v, 3).astype(np.float32) for k, v in floats.items()}
    mask = np.arange(TIME) < lengths[:, None]
    ids = rng.integers(0, VOCAB, size=(3 * PAIRS, TIME + 1)).astype(np.int32)
    desirable = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    return inputs | {"ids": ids, "mask": mask, "desirable": desirable}


def trl_values(inputs: dict[str, np.ndarray]) -> dict[str, list | float]:
    """Name -> the value (and, for `*_grad`, the gradient) of TRL and torch."""
    values = _dpo_values(inputs) | _kto_values(inputs) | _free_values(inputs)
    values |= _batch_values(inputs) | _extreme_values(inputs) | _other_values(inputs)
    return {k: _rounded(v) for k, v in values.items()}


def _rounded(x):
    if isinstance(x, list):
        return [_rounded(y) for y in x]
    return float(f"{x:.7g}")


def _trainer(**attributes):
    """What TRL's loss methods read from the trainer they belong to."""

    def same(x, **_):
        return x

    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    model._modules = {}  # accelerate looks, where peft is installed
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        beta=BETA,
        label_smoothing=EPS,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def _with_gradient(name, function, x):
    """{name: value, name_grad: gradient} of a torch function at an array."""
    import torch

    leaf = torch.tensor(x, requires_grad=True)
    value = function(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return {name: value.tolist(), f"{name}_grad": grad.tolist()}


def _outputs(logps, mask, log_sum_sq=None):
    """What the fused head returns; it is 0 where a token is not counted."""
    import torch

    zeros = torch.zeros(mask.shape)
    return SimpleNamespace(
        log_probs=logps * torch.tensor(mask),
        log_sum_sq_probs=zeros if log_sum_sq is None else torch.tensor(log_sum_sq),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def _tokens(mask):
    """Token ids and masks of a batch with one token of prompt before the completion."""
    import torch

    completion = torch.nn.functional.pad(torch.tensor(mask).long(), (1, 0))
    return {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }


def _dpo(inputs, rows, logps, kinds, weights, divergence="reverse_kl", modifier=""):
    """DPOTrainer's loss of some of the rows, with the reference's own forward."""
    import torch
    from trl import DPOTrainer

    mask = inputs["mask"][: 2 * PAIRS][rows]
    ref = inputs["ref_logps"][rows] * (modifier != "reference_free")
    trainer = _trainer(
        loss_types=kinds,
        loss_weights=weights,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=F_ALPHA,
        ld_alpha=LD_ALPHA if modifier == "ld" else None,
        use_weighting=modifier == "wpo",
        ref_model=lambda **_: _outputs(torch.tensor(ref), mask),
        args=SimpleNamespace(discopop_tau=TAU, gradient_checkpointing_kwargs=None),
    )
    outputs = _outputs(logps, mask, inputs["log_sum_sq_probs"][rows])
    return DPOTrainer._compute_loss(
        trainer, lambda **_: outputs, _tokens(mask), return_outputs=False
    )


def dpo_variants():
    """(name, loss types, weights, divergence, modifier) of all that is compared."""
    for modifier in ("", "ld", "wpo", "reference_free"):
        for kind in SCORED + RAW:
            if modifier == "wpo" and kind in ("aot", "aot_unpaired", "hinge"):
                continue  # TRL refuses aot; its in-place product breaks hinge
            if modifier == "reference_free" and kind != "sigmoid":
                continue
            for divergence in DIVERGENCES if kind in SCORED else ["reverse_kl"]:
                name = "/".join(filter(None, [kind, divergence, modifier]))
                yield name, [kind], [1.0], divergence, modifier
    for name, (kinds, weights) in MIXES.items():
        yield name, kinds, weights, "reverse_kl", ""


def _dpo_values(inputs):
    values, rows = {}, slice(None)
    for name, *variant in dpo_variants():
        values |= _with_gradient(
            name, lambda x, v=variant: _dpo(inputs, rows, x, *v), inputs["logps"]
        )
    return values


def _kto(inputs, rows, logps, kind):
    import torch
    from trl import KTOTrainer

    mask = inputs["mask"][: 2 * PAIRS][rows]
    longer = np.pad(mask, [(0, 0), (0, 1)])  # tells the KL's batch from the other
    tokens, kl_tokens = _tokens(mask), _tokens(longer)

    def model(logps, kl_logps):
        kl_logps = torch.nn.functional.pad(torch.tensor(kl_logps), (0, 1))

        def forward(labels, **_):
            if labels.shape[1] == longer.shape[1] + 1:
                return _outputs(kl_logps, longer)
            return _outputs(logps, mask)

        return forward

    batch = tokens | {f"KL_{k}": v for k, v in kl_tokens.items()}
    batch["label"] = torch.tensor(inputs["desirable"][rows])
    ref = torch.tensor(inputs["ref_logps"][rows])
    trainer = _trainer(
        loss_type=kind,
        calculate_KL=kind == "kto",
        desirable_weight=KTO_WEIGHTS[0],
        undesirable_weight=KTO_WEIGHTS[1],
        ref_model=model(ref, inputs["kl_ref_logps"][rows]),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )

    def kl_logps(model, batch):
        return KTOTrainer._compute_kl_logps(trainer, model, batch)

    trainer._compute_kl_logps = kl_logps
    policy = model(logps, inputs["kl_logps"][rows])
    return KTOTrainer._compute_loss(trainer, policy, batch, return_outputs=False)


def _kto_values(inputs):
    values = {}
    for kind in ("kto", "apo_zero_unpaired"):
        values |= _with_gradient(
            kind,
            lambda x, k=kind: _kto(inputs, slice(None), x, k),
            inputs["logps"],
        )
    return values


def _batch_values(inputs):
    """The same in two micro-batches: statistics of the batch make another loss."""
    import torch

    logps = torch.tensor(inputs["logps"])
    values = {}
    for kind in ("aot", "aot_unpaired", "sigmoid"):
        halves = [np.r_[i : i + 2, PAIRS + i : PAIRS + i + 2] for i in (0, 2)]
        parts = [_dpo(inputs, h, logps[h], [kind], [1.0]) for h in halves]
        values[f"{kind}_in_halves"] = torch.stack(parts).tolist()
    parts = [_kto(inputs, h, logps[h], "kto") for h in (slice(PAIRS), slice(PAIRS, 8))]
    return values | {"kto_in_halves": torch.stack(parts).tolist()}


def _extreme_values(inputs):
    """Where TRL overflows (or has no clamp) and jalign does otherwise on purpose."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    def dpo(chosen, kind, divergence):
        """A batch of one token each: log-ratios `chosen` and 0."""
        logps = torch.zeros(2 * PAIRS, TIME)
        logps[:PAIRS, 0] = chosen
        still = inputs | {"ref_logps": np.zeros_like(inputs["ref_logps"])}
        return _dpo(still, slice(None), logps, [kind], [1.0], divergence).item()

    certain, likely = torch.zeros(1), torch.full((1,), -1.0)
    orpo = ORPOTrainer.odds_ratio_loss(_trainer(), likely, certain)[0]
    alphapo = _trainer(alpha=1.0, simpo_gamma=0.0, loss_type="simpo")
    return {
        "extreme/discopop": dpo(-1e3, "discopop", "reverse_kl"),
        "extreme/forward_kl": dpo(-60.0, "sigmoid", "forward_kl"),
        "extreme/orpo": -orpo.item(),
        "extreme/alphapo": CPOTrainer.cpo_loss(
            alphapo, likely, torch.full((1,), -100.0)
        )[0].item(),
    }


def _free_values(inputs):
    """Losses without a reference, from the logits to the loss."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.tpo import TPOTrainer

    ids = torch.tensor(inputs["ids"]).long()
    completion = torch.nn.functional.pad(torch.tensor(inputs["mask"]).long(), (1, 0))
    attended = completion.clone()
    attended[:, 0] = 1
    labels = torch.where(completion.bool(), ids, -100)

    def pairs(cls, logits, **attributes):
        sides = {"chosen": slice(PAIRS), "rejected": slice(PAIRS, 2 * PAIRS)}
        batch = {}
        for side, rows in sides.items():
            batch[f"{side}_input_ids"] = ids[rows]
            batch[f"{side}_attention_mask"] = attended[rows]
            batch[f"{side}_labels"] = labels[rows]
        names = ["concatenated_inputs", "get_batch_logps"]
        attributes |= {name: getattr(cls, name) for name in names}
        trainer = _trainer(**attributes)
        for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(cls, name):
                setattr(trainer, name, getattr(cls, name).__get__(trainer))
        output = SimpleNamespace(logits=logits)
        model = lambda *_, **__: output  # noqa: E731
        return cls.get_batch_loss_metrics(trainer, model, batch)[0]

    def cpo(kind, shape=0.0, nll=0.0):
        options = {"loss_type": kind, "alpha": shape, "cpo_alpha": nll}
        return lambda x: pairs(CPOTrainer, x, simpo_gamma=GAMMA, **options)

    def tpo(kind, nll):
        def loss(logits):
            rows = slice(3 * PAIRS if nll else 2 * PAIRS)
            trainer = _trainer(loss_type=kind, tpo_alpha=nll, tpo_l_gamma=GAMMA)
            batch = {"input_ids": ids[rows], "attention_mask": attended[rows]}
            batch["completion_mask"] = completion[rows]
            output = SimpleNamespace(logits=logits[rows])
            return TPOTrainer._compute_loss(trainer, lambda **_: output, batch, False)

        return loss

    functions = {f"cpo/{k}": cpo(k) for k in ("sigmoid", "hinge", "ipo", "simpo")}
    functions["cpo/alphapo"] = cpo("simpo", SHAPE)
    functions["cpo/sigmoid/nll"] = cpo("sigmoid", nll=NLL)
    functions["orpo"] = lambda x: pairs(ORPOTrainer, x)
    functions |= {f"tpo/{k}": tpo(k, 0.0) for k in ("sigmoid", "tpo-l")}
    functions["tpo/sigmoid/nll"] = tpo("sigmoid", NLL)
    values, two = {}, inputs["logits"][: 2 * PAIRS]
    for name, function in functions.items():
        logits = inputs["logits"] if name.startswith("tpo") else two
        values |= _with_gradient(name, function, logits)
    return values


def _other_values(inputs):
    import torch
    from trl.trainer.callbacks import SyncRefModelCallback
    from trl.trainer.utils import _ChunkedLogProbFunction

    def linear(weight):
        layer = torch.nn.Linear(3, 2, bias=False)
        layer.weight.data = torch.tensor(weight)
        return layer

    ref = linear(inputs["ref_params"])
    SyncRefModelCallback._sync_target_model(linear(inputs["params"]), ref, SYNC)
    hidden, unembed = torch.tensor(inputs["hidden"]), torch.tensor(inputs["unembed"])
    targets = torch.zeros(4, dtype=torch.long)
    log_sum_sq = _ChunkedLogProbFunction.apply(
        hidden, unembed, None, targets, 1.0, 2, None, 1.0, ("log_sum_sq_probs",)
    )[2]
    return {
        "moving_reference": ref.weight.tolist(),
        "log_sum_sq_probs": log_sum_sq.tolist(),
    }


def main() -> None:
    import torch
    import trl

    inputs = make_inputs()
    document = {
        "made_by": "scripts/make_golden_preference.py",
        "torch": torch.__version__,
        "trl": trl.__version__,
        "inputs": {k: v.tolist() for k, v in inputs.items()},
        "values": trl_values(inputs),
    }
    lines = json.dumps(document, separators=(",", ":")).replace('],"', '],\n"')
    PATH.write_text(lines + "\n")


if __name__ == "__main__":
    main()
