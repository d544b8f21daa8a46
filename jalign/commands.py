"""What the one-shot commands do: `jalign generate` and `jalign eval`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jalign import data, evaluate, generate, models, rewards, sharding


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
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh))
    model, params = models.load(config.model, mesh=mesh, dtype=config.dtype)
    tokenizer = data.load_tokenizer(config.model)
    if config.prompts:
        rows: list[dict] = data.load_rows(config.prompts)
    elif config.chat:
        rows = [{"prompt": [{"role": "user", "content": p}]} for p in config.prompt]
    else:
        rows = [{"prompt": p} for p in config.prompt]
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
