"""What the one-shot commands do: `jalign generate` and `jalign eval`."""

import dataclasses
import json
import sys
from typing import Any, Literal

import jax
import numpy as np

from jalign import data, evaluate, rewards, sharding
from jalign.data.sources import Source
from jalign.paths import located, make_folder, write_text
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
from jalign.train.rows import examples_of, read_rows
from jalign.train.run import make_run_mesh

__all__ = ["EvalConfig", "GenerateConfig", "run_eval", "run_generate"]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Completions of prompts from a checkpoint; printed, or written as JSONL."""

    model: str
    """HF checkpoint, or an adapter in PEFT's format: a directory or a hub id."""
    base: str | None = None
    """Base of an adapter, a directory or a hub id; unset takes the one it names."""
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
    """Longest completion, in tokens."""
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
    """Of the sampling."""
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; default: all devices on fsdp, or none if one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and matrix products."""
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


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out measures of a checkpoint, as JSON.

    Preference pairs give the accuracy (a reward model's, or DPO's implicit reward
    against --ref-model); prompts with a --reward give the mean reward of samples; rows
    with completions, messages or text give loss and perplexity. --ref-model adds the KL
    to it, on samples.
    """

    model: str
    """HF checkpoint, or an adapter in PEFT's format: a directory or a hub id."""
    data: Source
    """Rows: a file, a directory or a hub id; "SOURCE[NAME]" names a split of it."""
    base: str | None = None
    """Base of --model where that is an adapter; unset takes the one it names."""
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


def run_generate(config: GenerateConfig) -> str | None:
    """Samples one completion a prompt; returns the text to print, or None."""
    mesh = make_run_mesh(config.mesh)
    opened = open_pretrained(config.model, config.base, head="language")
    prompts = _prompts(config, opened.tokenizer)
    loaded = load_pretrained(opened, mesh=mesh, dtype=config.dtype)
    filters = {"top_k": config.top_k, "top_p": config.top_p}
    texts = evaluate.sample_texts(*loaded, prompts, **_sampling(config), **filters)
    # As a row of `prompt` would hold it: a text or messages.
    given: list[Any] = [p.source.prompt if p.source else p.text for p in prompts]
    pairs = list(zip(given, texts, strict=True))
    if config.out is None:
        shown = (p + text if isinstance(p, str) else text for p, text in pairs)
        return "\n---\n".join(shown)
    rows = ({"prompt": prompt, "completion": text} for prompt, text in pairs)
    _write(config.out, "\n".join(map(json.dumps, rows)))
    return None


def _prompts(config: GenerateConfig, tokenizer) -> list[data.PromptExample]:
    if config.prompts:
        rows: list[dict] = read_rows(
            config.prompts, split=config.split, bad_rows=config.bad_rows
        )
    elif config.chat:
        rows = [{"prompt": [{"role": "user", "content": p}]} for p in config.prompt]
    else:
        rows = [{"prompt": p} for p in config.prompt]
    prompts, _ = examples_of(
        data.prompt_examples,
        rows,
        tokenizer,
        max_prompt_length=sys.maxsize,  # the sampler refuses one that is too long
        bad_rows=config.bad_rows,
        columns=config.columns,
    )
    return prompts


def _sampling(config: GenerateConfig | EvalConfig) -> dict[str, Any]:
    return {
        "key": jax.random.key(config.seed),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "batch_size": config.batch_size,
    }


def _write(path: str, text: str) -> None:
    """Writes a file of lines, on one of the processes."""
    if sharding.is_main_process():
        file = located(path)
        make_folder(file.parent)
        write_text(file, text + "\n")


def run_eval(config: EvalConfig) -> str:
    """Measures the model on the rows; returns the JSON text."""
    # Whatever is wrong with rows, rewards and paths is said before a model is loaded.
    mesh = make_run_mesh(config.mesh)
    length = config.max_length
    opened = open_pretrained(config.model, config.base, max_length=length)
    other = config.ref_model and open_pretrained(config.ref_model, head="language")
    if other:
        check_same_vocab(opened, other, "--model and --ref-model")
    rows = read_rows(
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
    result = _measure(task, config, loaded, examples, reference, reward)
    _check_finite(result, config)
    text = json.dumps(result | {"rows": counts}, indent=2, allow_nan=False)
    if config.out:
        _write(config.out, text)
    return text


def _measure(
    task: str, config: EvalConfig, loaded: Pretrained, examples, reference, reward
) -> dict[str, Any]:
    """The task's figures, of examples as it reads them."""
    model, params, _ = loaded
    if task == "preference":
        return _measure_pairs(config, model, params, examples, reference)
    if task == "sft":
        loader = _loader(config, model, examples, data.collate_tokens)
        measured = evaluate.eval_loss(model, params, loader)
        prompts = [e.tokens[: int(np.argmax(e.completion_mask))] for e in examples]
    else:
        found = evaluate.mean_reward(*loaded, examples, reward, **_sampling(config))
        measured = {f"reward_{name}": found[name] for name in ("mean", "std", "stderr")}
        prompts = [example.tokens for example in examples]
    if reference is not None:
        ref_model, ref_params, _ = reference
        how: dict[str, Any] = {"ref_model": ref_model} | _sampling(config)
        measured |= evaluate.kl_to_reference(model, params, ref_params, prompts, **how)
    return measured


def _measure_pairs(config, model, params, pairs, reference) -> dict[str, float]:
    if reference is not None:
        size, length = config.batch_size, config.max_length
        ref_model, ref_params, _ = reference
        pairs = reference_examples(
            ref_model, ref_params, {"rows": pairs}, batch_size=size, max_length=length
        )["rows"]
    loader = _loader(config, model, pairs, data.collate_preferences)
    return evaluate.preference_accuracy(model, params, loader)


def _loader(config: EvalConfig, model, examples, collate):
    how = {"batch_size": config.batch_size, "max_length": config.max_length}
    return measured_batches(model.mesh, examples, collate=collate, **how)[1]


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
    length = config.max_length
    if task == "sft":
        make, how["max_length"] = data.sft_examples, length
    elif task == "reward":
        make, how["max_prompt_length"] = data.prompt_examples, length
    else:
        make, how["max_length"] = data.preference_examples, length
        how["keep_tail"] = bool(opened.config.num_labels)
    return examples_of(make, rows, opened.tokenizer, **how)
