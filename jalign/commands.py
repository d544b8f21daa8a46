"""What the one-shot commands do: `jalign generate` and `jalign eval`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jalign import data, evaluate, models, rewards, sharding
from jalign.models.hf_read import config_of
from jalign.train.inputs import checked_tokenizer
from jalign.train.reference import reference_examples
from jalign.train.run import make_run_mesh


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Completions of prompts from a checkpoint; printed, or written as JSONL."""

    model: str
    """HF checkpoint: a directory or a hub id."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts: str | None = None
    """Instead: a file of prompt rows (`prompt`: a text or messages) or a hub id."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability."""
    chat: bool = False
    """Put each --prompt into the chat template as a user message."""
    batch_size: int = 64
    """Prompts decoded together (global)."""
    seed: int = 0
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; default: all devices on fsdp, or none if one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: str | None = None
    """Write rows {"prompt", "completion"} to this JSONL file instead of the screen."""

    def __post_init__(self):
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError("give either --prompt TEXT … or --prompts FILE")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("--batch-size and --max-new-tokens must be at least 1")


def run_generate(config: GenerateConfig) -> str | None:
    """Samples one completion a prompt; returns the text to print, or None."""
    mesh = make_run_mesh(config.mesh)
    tokenizer = checked_tokenizer(config.model)
    if config.prompts:
        rows: list[dict] = data.load_rows(config.prompts)
    elif config.chat:
        rows = [{"prompt": [{"role": "user", "content": p}]} for p in config.prompt]
    else:
        rows = [{"prompt": p} for p in config.prompt]
    model, params = models.load(config.model, mesh=mesh, dtype=config.dtype)
    texts = evaluate.sample_texts(
        model,
        params,
        tokenizer,
        rows,
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        batch_size=config.batch_size,
    )
    if config.out is None:
        shown = [
            row["prompt"] + text if isinstance(row["prompt"], str) else text
            for row, text in zip(rows, texts, strict=True)
        ]
        return "\n---\n".join(shown)
    if sharding.is_main_process():
        lines = (
            json.dumps({"prompt": row["prompt"], "completion": text})
            for row, text in zip(rows, texts, strict=True)
        )
        Path(config.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out measures of a checkpoint, as JSON.

    Preference pairs give the accuracy (a reward model's, or DPO's implicit reward
    against --ref-model); prompts with a --reward give the mean reward of samples; rows
    with completions, messages or text give loss and perplexity. --ref-model adds the KL
    to it, on samples.
    """

    model: str
    """HF checkpoint: a directory or a hub id."""
    data: str
    """Rows: a file, a directory or a hub id."""
    task: Literal["auto", "sft", "preference", "reward"] = "auto"
    """auto: preference if rows have chosen and rejected, reward with --reward."""
    ref_model: str | None = None
    """Reference checkpoint for implicit rewards and the KL."""
    reward: str | None = None
    """A reward checkpoint, a Python function (path/to/file.py:function), a built-in
    check (gsm8k, gsm8k_format), or a sum of them as for `jalign grpo`."""
    limit: int | None = None
    """Use the first rows only."""
    batch_size: int = 16
    max_length: int = 1024
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; default: all devices on fsdp."""
    bad_rows: Literal["error", "skip"] = "error"
    out: str | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if self.task == "reward" and not self.reward:
            raise ValueError("--task reward needs --reward CHECKPOINT or FILE.py:NAME")
        if self.reward and self.task in {"sft", "preference"}:
            raise ValueError(f"--reward is not used by --task {self.task}; drop one")


def run_eval(config: EvalConfig) -> str:
    """Measures the model on the rows; returns the JSON text."""
    # Whatever is wrong with rows, rewards and paths is said before a model is loaded.
    mesh = make_run_mesh(config.mesh)
    tokenizer = checked_tokenizer(config.model)
    if config.ref_model:
        config_of(config.ref_model)
    rows = data.load_rows(config.data, limit=config.limit, bad_rows=config.bad_rows)
    task = _task_of(config, rows)
    examples, counts = _EXAMPLES[task](config, rows, tokenizer)
    reward = _reward_fn(config.reward, mesh) if config.reward else None
    model, params = models.load(config.model, mesh=mesh)
    reference = None
    if config.ref_model:
        reference = models.load(config.ref_model, mesh=mesh)
    result = _MEASURES[task](
        config, model, params, tokenizer, examples, reference, reward
    )
    text = json.dumps(result | {"rows": counts}, indent=2)
    if config.out and sharding.is_main_process():
        Path(config.out).write_text(text + "\n", encoding="utf-8")
    return text


def _task_of(config: EvalConfig, rows: list[dict]) -> str:
    if config.task != "auto":
        return config.task
    if config.reward:
        return "reward"
    return "preference" if rows and "chosen" in rows[0] else "sft"


def _loader(config: EvalConfig, model, examples, collate):
    index, count = sharding.process_slice(model.mesh)
    return data.make_eval_loader(
        examples,
        batch_size=config.batch_size,
        collate=collate,
        max_length=config.max_length,
        shard_index=index,
        shard_count=count,
    )


def _sft_examples(config, rows, tokenizer):
    how = {"max_length": config.max_length, "bad_rows": config.bad_rows}
    return data.sft_examples(rows, tokenizer, **how)


def _pairs(config, rows, tokenizer):
    how = {"max_length": config.max_length, "bad_rows": config.bad_rows}
    return data.preference_examples(rows, tokenizer, **how)


def _prompts(config, rows, tokenizer):
    how = {"max_prompt_length": config.max_length, "bad_rows": config.bad_rows}
    return data.prompt_examples(rows, tokenizer, **how)


def _eval_sft(
    config, model, params, tokenizer, examples, reference, reward
) -> dict[str, Any]:
    loader = _loader(config, model, examples, data.collate_tokens)
    result = evaluate.eval_loss(model, params, loader)
    if reference is not None:
        prompts = [e.tokens[: int(np.argmax(e.completion_mask))] for e in examples]
        result |= _kl(config, model, params, tokenizer, prompts, reference)
    return result


def _eval_pairs(
    config, model, params, tokenizer, pairs, reference, reward
) -> dict[str, Any]:
    if reference is not None:
        size, length = config.batch_size, config.max_length
        ref_model, ref_params = reference
        pairs = reference_examples(
            ref_model, ref_params, {"rows": pairs}, batch_size=size, max_length=length
        )["rows"]
    loader = _loader(config, model, pairs, data.collate_preferences)
    return evaluate.preference_accuracy(model, params, loader)


def _eval_reward(
    config, model, params, tokenizer, prompts, reference, reward
) -> dict[str, Any]:
    result = evaluate.mean_reward(
        model,
        params,
        tokenizer,
        prompts,
        reward,
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )
    measured = {f"reward_{k}": result[k] for k in ("mean", "std", "stderr")}
    if reference is not None:
        tokens = [prompt.tokens for prompt in prompts]
        measured |= _kl(config, model, params, tokenizer, tokens, reference)
    return measured


_EXAMPLES = {"sft": _sft_examples, "preference": _pairs, "reward": _prompts}
_MEASURES = {"sft": _eval_sft, "preference": _eval_pairs, "reward": _eval_reward}


def _reward_fn(spec: str, mesh) -> rewards.RewardFn:
    """The sum that a --reward stands for."""
    terms = rewards.parse_rewards(spec)
    functions = [function for function, _ in rewards.load_terms(terms, mesh=mesh)]
    return rewards.weighted_sum(functions, [term.weight for term in terms])


def _kl(config, model, params, tokenizer, prompts, reference) -> dict[str, float]:
    ref_model, ref_params = reference
    return evaluate.kl_to_reference(
        model,
        params,
        ref_params,
        prompts,
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_tokens=[tokenizer.eos_token_id],
        ref_model=ref_model,
        batch_size=config.batch_size,
    )
