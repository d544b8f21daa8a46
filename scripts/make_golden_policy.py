"""Writes tests/losses/golden/trl_policy.json: TRL's policy losses and advantages.

TRL's own trainer methods run on given log-probabilities, rewards and hidden states; a
stub stands in for the trainer and the model around them. Run in an environment with
torch 2.13.0 and trl 1.16.0:

    python scripts/make_golden_policy.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "tests" / "losses" / "golden" / "trl_policy.json"
BETA, CLIP, CLIP_HIGH, LENGTH, CAP, FLOOR = 0.3, 0.2, 0.28, 9, 1.6, 0.7
GROUP, COEF, THRESHOLD, TEMPERATURE, SOFTCAP = 3, 0.05, 0.01, 0.8, 2.5
WEIGHTS = [1.0, 0.5]
LENGTHS = [5, 3, 4, 1, 2, 5]


def make_inputs() -> dict[str, np.ndarray]:
    """Small arrays, the same on every machine, rounded so that JSON stays readable."""
    rng = np.random.default_rng(0)
    old = -0.1 - 3 * rng.random((6, 5))
    rewards = rng.normal(size=(6, 2)) * [1.0, 20.0]
    rewards[4] = rewards[1, 1] = np.nan  # nobody could score row 4
    floats = {
        "old_logps": old,
        "logps": old + 0.4 * rng.normal(size=(6, 5)),
        "ref_logps": old + 0.4 * rng.normal(size=(6, 5)),
        "sampler_logps": old + 0.4 * rng.normal(size=(6, 5)),
        "advantages": [1.3, -0.7, 0.4, -1.2, 0.0, 0.9],
        "entropies": rng.random((6, 5)),
        "rewards": rewards,
        "logits": 3 * rng.normal(size=(2, 3, 7)),
        "ref_logits": 3 * rng.normal(size=(2, 3, 7)),
        "hidden": rng.normal(size=(2, 3, 4)),
        "unembed": rng.normal(size=(4, 7)),
        "ref_hidden": rng.normal(size=(2, 3, 6)),
        "ref_unembed": rng.normal(size=(6, 7)),
    }
    inputs = {k: np.round(v, 3).astype(np.float32) for k, v in floats.items()}
    return inputs | {
        "mask": np.arange(5) < np.array(LENGTHS)[:, None],
        "token_mask": np.array([[1, 1, 0], [1, 1, 1]], bool),
        "targets": rng.integers(0, 7, size=(2, 3)).astype(np.int32),
    }


def trl_values(inputs: dict[str, np.ndarray]) -> dict[str, list]:
    """Name -> the value (and, for `*_grad`, the gradient) of TRL and torch."""
    return {
        **_policy_values(inputs),
        **_advantage_values(inputs),
        **_sampler_values(inputs),
        **_divergence_values(inputs),
        **_dft_values(inputs),
    }


def _same(x, **_):
    return x


def _trainer(**attributes):
    """What TRL's methods read from the trainer they belong to."""
    accelerator = SimpleNamespace(
        device="cpu",
        gather=_same,
        gather_for_metrics=_same,
        reduce=_same,
        num_processes=1,
        process_index=0,
        parallelism_config=None,
        sync_gradients=False,
    )
    defaults = dict(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(lambda: defaultdict(list))
        | {k: [] for k in ("prompt", "completion", "advantages")},
        _pending_extra_logs={},
        _pending_metrics={},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SimpleNamespace(**(defaults | attributes))


def _policy_trainer(inputs, logps, options):
    import torch
    from trl import GRPOTrainer

    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    attributes = dict(
        loss_type="grpo",
        beta=0.0,
        epsilon_low=CLIP,
        epsilon_high=CLIP_HIGH,
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=COEF,
    )
    for key, value in options.items():
        (args if key in args else attributes)[key] = value
    entropies = torch.tensor(inputs["entropies"])
    attributes["args"] = SimpleNamespace(**args)
    trainer = _trainer(
        **attributes,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )
    if "rows" in options:  # a micro-batch
        rows = options["rows"]
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
            logps[rows],
            entropies[rows],
            None,
        )
    return trainer


def _batch(inputs, rows=slice(None), **extra):
    import torch
    from trl import GRPOTrainer

    mask = torch.tensor(inputs["mask"]).long()
    batch = {
        f"{k}_per_token_logps": torch.tensor(inputs[f"{k}_logps"])
        for k in ("old", "ref")
    }
    batch |= {"completion_ids": mask, "completion_mask": mask}
    batch |= {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0]}
    batch["advantages"] = torch.tensor(inputs["advantages"])
    batch |= {k: torch.tensor(v) for k, v in extra.items()}
    batch = {k: v[rows] for k, v in batch.items()}
    return GRPOTrainer, batch | {"num_items_in_batch": mask.sum()}


def _loss(inputs, trainer_class=None, extra=(), **options):
    """(value, gradient) of `_compute_loss` of GRPOTrainer or the class given."""
    import torch

    logps = torch.tensor(inputs["logps"], requires_grad=True)
    rows = options.get("rows", slice(None))
    default, batch = _batch(inputs, rows, **dict(extra))
    trainer = _policy_trainer(inputs, logps, options)
    value = (trainer_class or default)._compute_loss(trainer, None, batch)
    (grad,) = torch.autograd.grad(value, logps)
    return value.item(), grad.tolist()


VARIANTS: dict[str, dict] = {
    "grpo": {},
    "grpo_kl": {"beta": BETA},
    "grpo_unbiased_kl": {"beta": BETA, "use_bias_correction_kl": True},
    "grpo_delta": {"delta": 1.5},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo_dapo": {"importance_sampling_level": "sequence", "loss_type": "dapo"},
    "luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": CAP},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "vespo_kl": {"loss_type": "vespo", "beta": BETA},
    "bnpo_entropy": {"loss_type": "bnpo", "_entropy_bonus_enabled": True},
    "grpo_off_policy_mask": {"off_policy_mask_threshold": THRESHOLD},
}


def _policy_values(inputs):
    from trl.experimental.gmpo import GMPOTrainer

    values = {}

    def put(name, result):
        values[name], values[f"{name}_grad"] = result

    for name, options in VARIANTS.items():
        extra = {}
        if "off_policy" in name:
            extra = {"sampling_per_token_logps": inputs["sampler_logps"]}
        put(name, _loss(inputs, extra=extra, **options))
    clip = {"epsilon_low": 0.4, "epsilon_high": 0.3}
    put("gmpo", _loss(inputs, GMPOTrainer, **clip))
    put("gmpo_kl", _loss(inputs, GMPOTrainer, beta=BETA, **clip))
    put("rloo", _rloo_loss(inputs))
    return values | _differences(inputs)


def _differences(inputs):
    """What jalign computes otherwise on purpose, as TRL computes it."""
    halves = [
        _loss(
            inputs,
            rows=rows,
            loss_type="bnpo",
            current_gradient_accumulation_steps=2,
        )[0]
        for rows in (slice(0, 3), slice(3, 6))
    ]
    empty = dict(inputs, mask=inputs["mask"] & (np.arange(6) != 5)[:, None])
    far = dict(inputs, logps=inputs["logps"].copy())
    far["logps"][0, 0] = far["old_logps"][0, 0] + 100  # advantage > 0: clipped
    return {
        "bnpo_of_two_microbatches": sum(halves),
        "grpo_with_an_empty_row": _loss(empty)[0],
        "dr_grpo_with_an_empty_row": _loss(empty, loss_type="dr_grpo")[0],
        "far_ratio_gradient_is_finite": float(np.isfinite(_loss(far)[1]).all()),
    }


def _rloo_loss(inputs):
    import torch
    from trl import RLOOTrainer

    logps = torch.tensor(inputs["logps"], requires_grad=True)
    trainer = _policy_trainer(inputs, logps, {})
    _, batch = _batch(inputs)
    batch["old_logps"] = (
        batch.pop("old_per_token_logps") * batch["completion_mask"]
    ).sum(1)
    value = RLOOTrainer._compute_loss(trainer, None, batch)
    (grad,) = torch.autograd.grad(value, logps)
    return value.item(), grad.tolist()


def _scored(trainer_class, inputs, **options):
    """What `_generate_and_score_completions` returns for the rewards of the inputs."""
    import torch

    ids = [[1] * int(n) for n in LENGTHS]
    prompts = [[2]] * len(ids)
    sampler = [inputs["sampler_logps"][i, :n].tolist() for i, n in enumerate(LENGTHS)]
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)

    def generate(_):
        if trainer_class.__name__ == "RLOOTrainer":
            return prompts, ids, [""] * len(ids)
        logps = sampler if options.get("use_vllm") else None
        return prompts, ids, None, [""] * len(ids), logps, {}, None, None

    def logps_of(which, *_, **__):
        kind = "old" if which is model else "ref"
        return torch.tensor(inputs[f"{kind}_logps"]), None, None

    args = SimpleNamespace(
        per_device_train_batch_size=6,
        gradient_checkpointing_kwargs=None,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
    )
    attributes = dict(
        model=model,
        ref_model="ref",
        args=args,
        environment_factories=None,
        environments=None,
        tools=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=None,
        num_iterations=1,
        beta=0.0,
        num_generations=GROUP,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        normalize_advantages=False,
        reward_clip_range=None,
        log_multimodal=False,
        reward_weights=torch.tensor(WEIGHTS),
        reward_funcs=[None, None],
        reward_func_names=["a", "b"],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=generate,
        _calculate_rewards=lambda *_: torch.tensor(inputs["rewards"]),
        _get_per_token_logps_and_entropies=logps_of,
    )
    trainer = _trainer(**(attributes | options))
    rows = [{"prompt": "p"}] * len(ids)
    return trainer_class._generate_and_score_completions(trainer, rows)


def _advantage_values(inputs):
    from trl import GRPOTrainer, RLOOTrainer

    def advantages(trainer_class, rewards=inputs["rewards"], **options):
        scored = _scored(trainer_class, dict(inputs, rewards=rewards), **options)
        return scored["advantages"].tolist()

    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    equal = np.full((6, 2), 9e4 / 7, np.float32) * [1, 0]
    return {
        "advantages_group": advantages(GRPOTrainer),
        "advantages_none": advantages(GRPOTrainer, scale_rewards="none"),
        "advantages_batch": advantages(GRPOTrainer, scale_rewards="batch"),
        "advantages_gdpo": advantages(GRPOTrainer, **gdpo),
        "advantages_rloo": advantages(RLOOTrainer),
        "advantages_rloo_kl": advantages(RLOOTrainer, beta=BETA),
        "advantages_rloo_normalized": advantages(
            RLOOTrainer, normalize_advantages=True
        ),
        "advantages_of_equal_rewards": advantages(
            GRPOTrainer, equal.astype(np.float32)
        ),
    }


def _sampler_values(inputs):
    from trl import GRPOTrainer

    values = {}
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    bounds = {
        "vllm_importance_sampling_clip_max": CAP,
        "vllm_importance_sampling_clip_min": FLOOR,
    }
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        mode_option = {"vllm_importance_sampling_mode": mode}
        scored = _scored(GRPOTrainer, inputs, **vllm, **bounds, **mode_option)
        ratio = scored["importance_sampling_ratio"].numpy()
        values[f"weights_{mode}"] = np.broadcast_to(ratio, (6, 5)).tolist()
        extra = {"importance_sampling_ratio": ratio}
        corrected = _loss(inputs, extra=extra, beta=BETA, **vllm)
        values[f"grpo_{mode}"], values[f"grpo_{mode}_grad"] = corrected
    free = bounds | {k: None for k in bounds}
    mode_option = {"vllm_importance_sampling_mode": "token_mask"}
    scored = _scored(GRPOTrainer, inputs, **vllm, **free, **mode_option)
    extra = {"importance_sampling_ratio": scored["importance_sampling_ratio"].numpy()}
    corrected = _loss(inputs, extra=extra, loss_type="vespo", **vllm)
    values["vespo_sampler"], values["vespo_sampler_grad"] = corrected
    return values


def _divergence_values(inputs):
    import torch
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    values, x = {}, {k: torch.tensor(v) for k, v in inputs.items()}
    for beta in (0.0, 0.3, 1.0):
        logits = x["logits"].clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(
            logits,
            x["ref_logits"],
            beta=beta,
            temperature=TEMPERATURE,
            reduction="none",
        ).sum(-1)
        values[f"jsd_{beta}"] = loss.tolist()
        values[f"jsd_{beta}_grad"] = torch.autograd.grad(loss.sum(), logits)[0].tolist()
        hidden = x["hidden"].clone().requires_grad_()
        head = x["unembed"].T.contiguous().requires_grad_()
        loss, entropy, _ = _chunked_divergence_loss(
            hidden,
            x["ref_hidden"],
            head,
            x["ref_unembed"].T.contiguous(),
            x["token_mask"],
            beta,
            student_final_logit_softcapping=SOFTCAP,
            teacher_final_logit_softcapping=SOFTCAP,
            temperature=TEMPERATURE,
        )
        grads = torch.autograd.grad(loss, (hidden, head))
        values[f"token_jsd_{beta}"] = loss.item()
        values[f"token_jsd_{beta}_grad_hidden"] = grads[0].tolist()
        values[f"token_jsd_{beta}_grad_unembed"] = grads[1].T.tolist()
    return values | {"token_entropy_sum": entropy.item()}


def _dft_values(inputs):
    import torch
    from trl import SFTTrainer
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = torch.tensor(inputs["token_mask"])
    logps = torch.tensor(inputs["logps"][:2, :3], requires_grad=True)
    outputs = SimpleNamespace(
        log_probs=torch.where(mask, logps, 0.0),  # zero on ignored positions
        label_mask=mask,
        entropy=mask.float(),
        is_top1=mask,
    )
    args = {"loss_type": "dft", "average_tokens_across_devices": False}
    trainer = _trainer(
        args=SimpleNamespace(**args), compute_loss_func=None, label_smoother=None
    )
    value = SFTTrainer.compute_loss(
        trainer, lambda **_: outputs, {"labels": mask, "attention_mask": mask}
    )
    (grad,) = torch.autograd.grad(value, logps)
    is_top1 = ChunkedLogProbFunction.apply(
        torch.tensor(inputs["hidden"]).flatten(0, 1),
        torch.tensor(inputs["unembed"]).T.contiguous(),
        None,
        torch.tensor(inputs["targets"]).long().flatten(),
        1.0,
        4,
    )[4]
    accuracy = is_top1.float().reshape(2, 3).tolist()
    return {"dft": value.item(), "dft_grad": grad.tolist(), "accuracy": accuracy}


def _rounded(x):
    """Nine digits give a float32 back exactly."""
    if isinstance(x, list):
        return [_rounded(y) for y in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


def main() -> None:
    import torch
    import trl

    inputs = make_inputs()
    document = {
        "made_by": "scripts/make_golden_policy.py",
        "torch": torch.__version__,
        "trl": trl.__version__,
    }
    tables = {
        "inputs": {k: _rounded(v.tolist()) for k, v in inputs.items()},
        "values": {k: _rounded(v) for k, v in trl_values(inputs).items()},
    }
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in document.items()]
    for name, table in tables.items():
        rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
