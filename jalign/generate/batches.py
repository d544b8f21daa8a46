"""Many prompts, decoded some at a time; and the text that a completion adds."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jalign.generate.engine import completion_lists, generate
from jalign.generate.inputs import Tokens, check_prompts, row_keys
from jalign.models import Model
from jalign.types import PyTree


def generate_lists(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    batch_size: int = 64,
    **settings: Any,
) -> list[list[int]]:
    """`generate`, at most batch_size prompts at once; a row does not depend on that.

    Args:
      model, params, prompts, key: as in `generate`.
      batch_size: prompts decoded together (global).
      max_new_tokens, **settings: as in `generate`.

    Returns: each prompt's completion, token ids with the stop token, on the host.
    Raises: as `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check_prompts(prompts, model.config, max_new_tokens)
    keys = row_keys(key, len(prompts), len(prompts))
    impl = jax.random.key_impl(key)
    size = min(batch_size, len(prompts))
    # One shape for all parts: one compilation.
    pad_to = size, max(map(len, prompts))
    completions: list[list[int]] = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        part = generate(
            model,
            params,
            prompts[rows],
            key=jax.random.wrap_key_data(jnp.asarray(keys[rows]), impl=impl),
            max_new_tokens=max_new_tokens,
            pad_to=pad_to,
            **settings,
        )
        completions += completion_lists(part)
    return completions


def continuations(
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    stop_tokens: Sequence[int] = (),
) -> list[str]:
    """`continuation` of each of B prompts."""
    return [
        continuation(tokenizer, prompt, completion, stop_tokens)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def continuation(
    tokenizer: Any,
    prompt: Sequence[int],
    completion: Sequence[int],
    stop_tokens: Sequence[int] = (),
) -> str:
    """The text that the completion's ids add to the prompt's, no special tokens.

    A stop token at its end is left out, special or not. Decoding the completion alone
    would lose the space before its first word with tokenizers of the SentencePiece
    kind, and split characters that cross the border.
    """
    prompt, completion = list(prompt), list(completion)
    if completion and completion[-1] in stop_tokens:
        completion.pop()
    how = {"skip_special_tokens": True}
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        # The text as it is: a tidied one is another one to whoever encodes it again.
        how["clean_up_tokenization_spaces"] = False
    before = tokenizer.decode(prompt, **how)
    both = tokenizer.decode(prompt + completion, **how)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(completion, **how)
