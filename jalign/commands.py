"""What the one-shot commands do: `jalign generate` and `jalign eval`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jalign import data, evaluate, rewards, sharding
from jalign.pretrained import Pretrained, check_same_vocab, load_pretrained
from jalign.train.online_config import check_reward_timeout
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
    """Instead: rows with prompts: a file, a directory or a hub id."""
    split: str | None = None
    """Split of --prompts; unset takes train, or what has no splits whole."""
    columns: str | None = None
    """Names of the columns of --prompts, such as "prompt=question"."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows of --prompts that cannot be used."""
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
        data.parse_columns(self.columns)
        if self.prompt and (self.split or self.columns):
            raise ValueError("--split and --columns are of --prompts FILE")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("--batch-size and --max-new-tokens must be at least 1")


def run_generate(config: GenerateConfig) -> str | None:
    """Samples one completion a prompt; returns the text to print, or None."""
    mesh = make_run_mesh(config.mesh)
    loaded = load_pretrained(
        config.model, mesh=mesh, dtype=config.dtype, head="language"
    )
    prompts, given = _generate_prompts(config, loaded.tokenizer)
    texts = evaluate.sample_texts(
        *loaded,
        prompts,
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        batch_size=config.batch_size,
    )
    if config.out is None:
        shown = [
            prompt + text if isinstance(prompt, str) else text
            for prompt, text in zip(given, texts, strict=True)
        ]
        return "\n---\n".join(shown)
    if sharding.is_main_process():
        lines = (
            json.dumps({"prompt": prompt, "completion": text})
            for prompt, text in zip(given, texts, strict=True)
        )
        Path(config.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


def _generate_prompts(
    config: GenerateConfig, tokenizer
) -> tuple[list[data.PromptExample], list[Any]]:
    """The prompts, and each as a row of `prompt` would hold it: a text or messages."""
    if config.prompts:
        rows: list[dict] = data.load_rows(
            config.prompts, split=config.split, bad_rows=config.bad_rows
        )
    elif config.chat:
        rows = [{"prompt": [{"role": "user", "content": p}]} for p in config.prompt]
    else:
        rows = [{"prompt": p} for p in config.prompt]
    prompts, _ = data.prompt_examples(
        rows,
        tokenizer,
        max_prompt_length=sys.maxsize,  # the sampler refuses one that is too long
        bad_rows=config.bad_rows,
        columns=config.columns,
    )
    return prompts, [p.source.prompt if p.source else p.text for p in prompts]


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
    """Rows: a file, a directory or a hub id; "SOURCE[NAME]" names a split of it."""
    split: str | None = None
    """Which split; unset takes test or validation, never train, or what has none."""
    columns: str | None = None
    """Names of columns, such as "prompt=question,completion=answer,ignore=label"."""
    task: Literal["auto", "sft", "preference", "reward"] = "auto"
    """auto: preference if rows have chosen and rejected, reward with --reward."""
    ref_model: str | None = None
    """Reference checkpoint for implicit rewards and the KL."""
    reward: str | None = None
    """A reward checkpoint, a Python function (path/to/file.py:function), a built-in
    check (gsm8k, gsm8k_format), or a sum of them as for `jalign grpo`."""
    reward_timeout: float = 600.0
    """Seconds after which a call of a Python reward function counts as hanging."""
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
        data.parse_columns(self.columns)
        check_reward_timeout(self.reward_timeout)
        if self.task == "reward" and not self.reward:
            raise ValueError("--task reward needs --reward CHECKPOINT or FILE.py:NAME")
        if self.reward and self.task in {"sft", "preference"}:
            raise ValueError(f"--reward is not used by --task {self.task}; drop one")


def run_eval(config: EvalConfig) -> str:
    """Measures the model on the rows; returns the JSON text."""
    mesh = make_run_mesh(config.mesh)
    loaded = load_pretrained(config.model, mesh=mesh)
    rows = data.load_rows(
        config.data,
        split=config.split or data.HELD_OUT,
        limit=config.limit,
        bad_rows=config.bad_rows,
    )
    reference = None
    if config.ref_model:
        reference = load_pretrained(config.ref_model, mesh=mesh, head="language")
        check_same_vocab(loaded, reference, "--model and --ref-model")
    measure = {"sft": _eval_sft, "preference": _eval_pairs, "reward": _eval_reward}
    result = measure[_task_of(config, rows)](config, loaded, rows, reference)
    _check_finite(result, config)
    text = json.dumps(result, indent=2, allow_nan=False)
    if config.out and sharding.is_main_process():
        Path(config.out).write_text(text + "\n", encoding="utf-8")
    return text


def _check_finite(result: dict[str, Any], config: EvalConfig) -> None:
    bad = [k for k, v in result.items() if isinstance(v, float) and not np.isfinite(v)]
    if bad:
        raise ValueError(
            f"{config.model}: {', '.join(bad)} on {config.data} is no finite number; "
            "are its weights sound? (a row beyond the model's context can do it, too)"
        )


def _task_of(config: EvalConfig, rows: list[dict]) -> str:
    if config.task != "auto":
        return config.task
    if config.reward:
        return "reward"
    return "preference" if data.are_pairs(rows, config.columns) else "sft"


def _how(config: EvalConfig) -> dict[str, Any]:
    return {"bad_rows": config.bad_rows, "columns": config.columns}


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


def _eval_sft(config, loaded: Pretrained, rows, reference) -> dict[str, Any]:
    model, params, tokenizer = loaded
    examples, counts = data.sft_examples(
        rows, tokenizer, max_length=config.max_length, **_how(config)
    )
    loader = _loader(config, model, examples, data.collate_tokens)
    result = evaluate.eval_loss(model, params, loader) | {"rows": counts}
    if reference is not None:
        prompts = [e.tokens[: int(np.argmax(e.completion_mask))] for e in examples]
        result |= _kl(config, loaded, prompts, reference)
    return result


def _eval_pairs(config, loaded: Pretrained, rows, reference) -> dict[str, Any]:
    model, params, tokenizer = loaded
    pairs, counts = data.preference_examples(
        rows,
        tokenizer,
        max_length=config.max_length,
        keep_tail=bool(model.config.num_labels),
        **_how(config),
    )
    if reference is not None:
        size, length = config.batch_size, config.max_length
        ref_model, ref_params, _ = reference
        pairs = reference_examples(
            ref_model, ref_params, {"rows": pairs}, batch_size=size, max_length=length
        )["rows"]
    loader = _loader(config, model, pairs, data.collate_preferences)
    return evaluate.preference_accuracy(model, params, loader) | {"rows": counts}


def _eval_reward(config, loaded: Pretrained, rows, reference) -> dict[str, Any]:
    model, params, tokenizer = loaded
    prompts, counts = data.prompt_examples(
        rows, tokenizer, max_prompt_length=config.max_length, **_how(config)
    )
    result = evaluate.mean_reward(
        model,
        params,
        tokenizer,
        prompts,
        _reward_fn(config, model.mesh),
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )
    measured = {f"reward_{k}": result[k] for k in ("mean", "std", "stderr")}
    if reference is not None:
        tokens = [prompt.tokens for prompt in prompts]
        measured |= _kl(config, loaded, tokens, reference)
    return measured | {"rows": counts}


def _reward_fn(config: EvalConfig, mesh) -> rewards.RewardFn:
    """The sum that a --reward stands for."""
    assert config.reward is not None
    terms = rewards.parse_rewards(config.reward)
    how = {"timeout": config.reward_timeout, "mesh": mesh}
    functions = [rewards.load_term(term.source, **how)[0] for term in terms]
    return rewards.weighted_sum(functions, [term.weight for term in terms])


def _kl(config, loaded: Pretrained, prompts, reference) -> dict[str, float]:
    model, params, tokenizer = loaded
    ref_model, ref_params, _ = reference
    return evaluate.kl_to_reference(
        model,
        params,
        ref_params,
        prompts,
        key=jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_tokens=data.stop_tokens(tokenizer, model.config.eos_token_ids),
        ref_model=ref_model,
        batch_size=config.batch_size,
    )
