"""`jalign generate`: completions of prompts from a checkpoint."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from jalign import data, evaluate, sharding
from jalign.pretrained import load_pretrained, open_pretrained
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


def run_generate(config: GenerateConfig) -> str | None:
    """Samples one completion a prompt; returns the text to print, or None."""
    mesh = make_run_mesh(config.mesh)
    opened = open_pretrained(config.model, head="language")
    prompts, given = _generate_prompts(config, opened.tokenizer)
    loaded = load_pretrained(opened, mesh=mesh, dtype=config.dtype)
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
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
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
