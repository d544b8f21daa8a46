"""`jalign eval`: held-out measures of a checkpoint, as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jalign import data, evaluate, rewards, sharding
from jalign.data.sources import Source
from jalign.pretrained import (
    Opened,
    Pretrained,
    check_same_vocab,
    load_pretrained,
    open_pretrained,
)
from jalign.rewards.terms import Rewards
from jalign.settings import as_text
from jalign.train.measured import measured_batches, reference_examples
from jalign.train.online_config import check_reward_timeout
from jalign.train.run import make_run_mesh


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
    data: Source
    """Rows: a file, a directory or a hub id; "SOURCE[NAME]" names a split of it."""
    split: str | None = None
    """Which split; unset takes test or validation, never train, or what has none."""
    columns: str | None = None
    """Names of columns, such as "prompt=question,completion=answer,ignore=label"."""
    task: Literal["auto", "sft", "preference", "reward"] = "auto"
    """auto: preference if rows have chosen and rejected, reward with --reward."""
    ref_model: str | None = None
    """Reference checkpoint for implicit rewards and the KL."""
    reward: Rewards | None = None
    """A reward checkpoint, a Python function (path/to/file.py:function), a built-in
    check (gsm8k, gsm8k_format), or a sum of them as for `jalign grpo`."""
    reward_timeout: float = 600.0
    """Seconds after which a call of a Python reward function counts as hanging."""
    limit: int | None = None
    """Use the first rows only."""
    batch_size: int = 16
    """Rows (pairs, prompts) together, over all devices."""
    max_length: int = 1024
    """Longest row in tokens; what is longer loses its end."""
    max_new_tokens: int = 128
    """Longest sampled completion, in tokens."""
    temperature: float = 1.0
    """Of the sampling; divides the logits."""
    seed: int = 0
    """Of the sampling."""
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; default: all devices on fsdp."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be used: stop, or count and leave out."""
    out: str | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        data.parse_columns(self.columns)
        if self.reward is not None:
            rewards.parse_rewards(self.reward)
        check_reward_timeout(self.reward_timeout)
        if self.task == "reward" and not self.reward:
            raise ValueError("--task reward needs --reward CHECKPOINT or FILE.py:NAME")
        if self.reward and self.task in {"sft", "preference"}:
            raise ValueError(f"--reward is not used by --task {self.task}; drop one")


def run_eval(config: EvalConfig) -> str:
    """Measures the model on the rows; returns the JSON text."""
    # Whatever is wrong with rows, rewards and paths is said before a model is loaded.
    mesh = make_run_mesh(config.mesh)
    opened = open_pretrained(config.model, max_length=config.max_length)
    other = config.ref_model and open_pretrained(config.ref_model, head="language")
    if other:
        check_same_vocab(opened, other, "--model and --ref-model")
    rows = data.load_rows(
        config.data,
        split=config.split or data.HELD_OUT,
        limit=config.limit,
        bad_rows=config.bad_rows,
    )
    task = _task_of(config, rows)
    if opened.config.num_labels and task != "preference":
        raise ValueError(
            f"{config.model} is a reward model: it is measured on preference pairs "
            f"(chosen and rejected), and {as_text(config.data)} has none"
        )
    examples, counts = _examples(task, config, rows, opened)
    reward = None
    if config.reward:
        seconds = config.reward_timeout
        reward = rewards.load_reward(config.reward, timeout=seconds, mesh=mesh)
    loaded = load_pretrained(opened, mesh=mesh)
    reference = load_pretrained(other, mesh=mesh) if other else None
    measure = {"sft": _eval_sft, "preference": _eval_pairs, "reward": _eval_reward}
    result = measure[task](config, loaded, examples, reference, reward)
    _check_finite(result, config)
    text = json.dumps(result | {"rows": counts}, indent=2, allow_nan=False)
    if config.out and sharding.is_main_process():
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(text + "\n", encoding="utf-8")
    return text


def _check_finite(result: dict[str, Any], config: EvalConfig) -> None:
    bad = [k for k, v in result.items() if isinstance(v, float) and not np.isfinite(v)]
    if bad:
        raise ValueError(
            f"{config.model}: {', '.join(bad)} on {as_text(config.data)} is no finite "
            "number; are its weights sound?"
        )


def _task_of(config: EvalConfig, rows: list[dict]) -> str:
    if config.task != "auto":
        return config.task
    if config.reward:
        return "reward"
    return "preference" if data.are_pairs(rows, config.columns) else "sft"


def _examples(task: str, config: EvalConfig, rows: data.Rows, opened: Opened):
    """(the rows as the task reads them, what became of them)."""
    how: Any = {"bad_rows": config.bad_rows, "columns": config.columns}
    length, tokenizer = config.max_length, opened.tokenizer
    if task == "sft":
        return data.sft_examples(rows, tokenizer, max_length=length, **how)
    if task == "reward":
        return data.prompt_examples(rows, tokenizer, max_prompt_length=length, **how)
    how["keep_tail"] = bool(opened.config.num_labels)
    return data.preference_examples(rows, tokenizer, max_length=length, **how)


def _loader(config: EvalConfig, model, examples, collate):
    how = {"batch_size": config.batch_size, "max_length": config.max_length}
    return measured_batches(model.mesh, examples, collate=collate, **how)[1]


def _eval_sft(config, loaded: Pretrained, examples, reference, _) -> dict[str, Any]:
    model, params, _ = loaded
    loader = _loader(config, model, examples, data.collate_tokens)
    result = evaluate.eval_loss(model, params, loader)
    if reference is not None:
        prompts = [e.tokens[: int(np.argmax(e.completion_mask))] for e in examples]
        result |= _kl(config, loaded, prompts, reference)
    return result


def _eval_pairs(config, loaded: Pretrained, pairs, reference, _) -> dict[str, Any]:
    model, params, _ = loaded
    if reference is not None:
        size, length = config.batch_size, config.max_length
        ref_model, ref_params, _ = reference
        pairs = reference_examples(
            ref_model, ref_params, {"rows": pairs}, batch_size=size, max_length=length
        )["rows"]
    loader = _loader(config, model, pairs, data.collate_preferences)
    return evaluate.preference_accuracy(model, params, loader)


def _eval_reward(
    config, loaded: Pretrained, prompts, reference, reward
) -> dict[str, Any]:
    result = evaluate.mean_reward(
        *loaded,
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
        measured |= _kl(config, loaded, tokens, reference)
    return measured


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
