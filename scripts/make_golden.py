"""Writes tests/losses/golden/trl.json: losses and gradients as TRL computes them.

TRL's own loss code runs on given log-probabilities; a stub stands in for the trainer
and the model around it. Run in an environment with torch 2.13.0 and trl 1.16.0:

    python scripts/make_golden.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PATH = Path(__file__).resolve().parents[1] / "tests" / "losses" / "golden" / "trl.json"
BETA, LABEL_SMOOTHING, CLIP, CLIP_HIGH, LENGTH = 0.3, 0.1, 0.2, 0.28, 9


def make_inputs() -> dict[str, np.ndarray]:
    """Small arrays, the same on every machine, rounded so that JSON stays readable."""
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    floats = {
        "logits": 3 * rng.normal(size=(3, 6, 7)),
        "logps": -3 * rng.random((3, 6)),
        "old_logps": -3 * rng.random((3, 6)),
        "ref_logps": -3 * rng.random((3, 6)),
        "chosen": -30 * rng.random(4),
        "rejected": -30 * rng.random(4),
        "ref_chosen": -30 * rng.random(4),
        "ref_rejected": -30 * rng.random(4),
        "margin": rng.random(4),
        "advantages": rng.normal(size=(3, 6)),
    }
    inputs = {k: np.round(v, 3).astype(np.float32) for k, v in floats.items()}
    targets = rng.integers(0, 7, size=(3, 6)).astype(np.int32)
    return inputs | {"targets": targets, "mask": mask.astype(bool)}


def trl_values(inputs: dict[str, np.ndarray]) -> dict[str, list]:
    """Name -> the value (and, for `*_grad`, the gradient) of TRL and torch."""
    return _logits_values(inputs) | _pair_values(inputs) | _policy_values(inputs)


def _logits_values(inputs):
    import torch
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = torch.tensor(inputs["logits"])
    targets = torch.tensor(inputs["targets"]).long()
    smoothed = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        label_smoothing=LABEL_SMOOTHING,
        reduction="none",
    )
    return {
        "logps": selective_log_softmax(logits, targets).tolist(),
        "entropy": entropy_from_logits(logits).tolist(),
        "cross_entropy": smoothed.reshape(targets.shape).tolist(),
    }


def _pair_values(inputs):
    losses = defaultdict(list)
    for i in range(len(inputs["chosen"])):  # TRL returns means: one pair at a time
        pair = {k: inputs[k][i] for k in ("chosen", "rejected", "margin")}
        pair |= {k: inputs[k][i] for k in ("ref_chosen", "ref_rejected")}
        for name, value in (_dpo(pair) | _reward(pair)).items():
            losses[name].append(value)
    return dict(losses)


def _trainer(**attributes):
    """What TRL's loss methods read from the trainer they belong to."""

    def same(x, **_):
        return x

    accelerator = SimpleNamespace(
        device="cpu", gather=same, gather_for_metrics=same, reduce=same
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def _dpo(pair):
    import torch
    from trl import DPOTrainer

    logps = torch.tensor([[pair["chosen"]], [pair["rejected"]]], requires_grad=True)
    zeros = torch.zeros(2, 1)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    ids = torch.ones(2, 2, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": ids}
    for side in ("chosen", "rejected"):
        inputs[f"ref_{side}_logps"] = torch.tensor([pair[f"ref_{side}"]])

    def loss(kind):
        trainer = _trainer(
            beta=BETA,
            label_smoothing=LABEL_SMOOTHING,
            loss_types=[kind],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
            precompute_ref_logps=True,
        )
        value = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
        (grad,) = torch.autograd.grad(value, logps)
        metrics = trainer._metrics["train"]
        return value.item(), grad.flatten().tolist(), metrics["rewards/chosen"][0]

    value, grad, reward = loss("sigmoid")
    # TRL has no cDPO any more; "aot" of a single pair, with nothing to sort, is it.
    smoothed, smoothed_grad, _ = loss("aot")
    return {
        "dpo": value,
        "dpo_grad": grad,
        "cdpo": smoothed,
        "cdpo_grad": smoothed_grad,
        "implicit_rewards": reward,
    }


def _reward(pair):
    import torch
    from trl import RewardTrainer

    def loss(center):
        scores = torch.tensor([pair["chosen"], pair["rejected"]], requires_grad=True)
        inputs = {
            "margin": torch.tensor([pair["margin"]]),
            "attention_mask": torch.ones(2, 1),
        }
        trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=center))
        outputs = SimpleNamespace(logits=scores[:, None])
        value = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
        (grad,) = torch.autograd.grad(value, scores)
        return value.item(), grad.tolist()

    value, grad = loss(None)
    return {
        "bradley_terry": value,
        "bradley_terry_grad": grad,
        "bradley_terry_centered": loss(0.01)[0],
    }


def _policy_values(inputs):
    import torch
    from trl import GRPOTrainer

    mask = torch.tensor(inputs["mask"]).long()
    batch = {k: torch.tensor(inputs[k]) for k in ("advantages",)}
    batch |= {
        f"{k}_per_token_logps": torch.tensor(inputs[f"{k}_logps"])
        for k in ("old", "ref")
    }
    batch |= {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0]}
    batch |= {"completion_ids": mask, "completion_mask": mask}

    def loss(kind, beta):
        logps = torch.tensor(inputs["logps"], requires_grad=True)
        trainer = _trainer(
            loss_type=kind,
            beta=beta,
            epsilon_low=CLIP,
            epsilon_high=CLIP_HIGH,
            importance_sampling_level="token",
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            use_vllm=False,
            max_completion_length=LENGTH,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps, logps, None),
        )
        value = GRPOTrainer._compute_loss(trainer, None, batch)
        (grad,) = torch.autograd.grad(value, logps)
        clipped = trainer._metrics["train"]["clip_ratio/region_mean"][0]
        return value.item(), grad.tolist(), clipped

    values = {}
    for ours, theirs in {
        "token_mean": "bnpo",
        "sequence_mean": "grpo",
        "fixed_length_mean": "dr_grpo",
    }.items():
        for beta in (0.0, BETA):
            name = f"policy_{'kl_' if beta else ''}{ours}"
            values[name], values[f"{name}_grad"], clipped = loss(theirs, beta)
    return values | {"clip_frac": clipped}


def main() -> None:
    import torch
    import trl

    inputs = make_inputs()
    document = {
        "made_by": "scripts/make_golden.py",
        "torch": torch.__version__,
        "trl": trl.__version__,
        "inputs": {k: v.tolist() for k, v in inputs.items()},
        "values": trl_values(inputs),
    }
    PATH.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
