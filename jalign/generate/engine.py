"""Prompts in, completions out: checked, padded to few shapes, placed on a mesh.

Prompts are padded on the right; a prompt goes through the model once, however many
completions are asked of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding
from jalign.generate.decode import complete
from jalign.generate.sampling import row_keys, sampler_for
from jalign.models import Model
from jalign.types import Completion, PyTree

Tokens = Sequence[int] | np.ndarray


def generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    group_size: int = 1,
    pad_to: tuple[int, int] = (1, 1),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Completion:
    """Continue each prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its prompt, its index and the key only, not on the other
    rows, the padding or the mesh. All rows are decoded at once, see `generate_lists`
    for many. With several processes, each one passes the same prompts and key and gets
    the same global arrays; `to_host` fetches them.

    Args:
      model: a causal language model; its mesh, if any, shards the rows.
      params: its parameters.
      prompts: sequences of token ids, of any lengths >= 1.
      key: PRNG key [], folded with the row index; or keys [B], one for each row.
      max_new_tokens: N, the most tokens to generate for a row.
      group_size: G, completions of each prompt. B = prompts * G rows come out, those
        of a prompt behind each other.
      pad_to: so many prompts, and tokens of the longest one, are computed with at
        least, so that calls with fewer or shorter ones share a compilation.
      temperature: divides the logits; 0 means greedy.
      top_k: sample among the k likeliest tokens only; 0 for all.
      top_p: sample among the likeliest tokens that reach this probability only.
      stop_tokens: token ids that end a row (the stop token is part of the result).

    Returns:
      Completion with [B, N] arrays. logps are log softmax(logits / temperature) of
      the unfiltered distribution; greedy decoding reports temperature 1.

    Raises:
      ValueError: an argument out of range, naming it, or a bad prompt, naming its row.
      FloatingPointError: the model's logits were NaN or infinite, naming the rows.
    """
    check_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        group_size=group_size,
    )
    check_tokens("stop_tokens", stop_tokens, model.config.vocab_size)
    check_prompts(prompts, model.config, max_new_tokens)
    asked, padded = len(prompts) * group_size, max(len(prompts), pad_to[0])
    parts = sharding.batch_parts(model.mesh)
    total = -(-padded // parts) * parts
    tokens, lengths = pad_prompts(prompts, total, pad_to[1])
    keys = row_keys(key, asked, total * group_size)
    stops = np.asarray(stop_tokens, np.int32).reshape(-1)
    draw, scalars = sampler_for(temperature, top_k, top_p)
    completion, bad = complete(
        params,
        place((tokens, lengths, keys), model.mesh),
        (scalars, stops, np.int32(asked)),
        model=model,
        draw=draw,
        key_impl=str(jax.random.key_impl(key)),
        rows=padded * group_size,
        max_new_tokens=max_new_tokens,
    )
    bad = np.flatnonzero(sharding.gather(bad))
    if bad.size:
        raise FloatingPointError(
            "the model's logits are NaN or infinite while sampling, in row(s) "
            f"{', '.join(map(str, bad[:8]))}{' …' if bad.size > 8 else ''} of "
            f"{asked}: look at the parameters it was given"
        )
    if asked < padded * group_size:
        completion = jax.tree.map(lambda x: x[:asked], completion)
    return completion


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


def to_host(completion: Completion) -> Completion:
    """The same completion as NumPy arrays [B, N], on every process."""
    return sharding.gather(completion)


def completion_lists(completion: Completion) -> list[list[int]]:
    """Each row's generated token ids, stop token included, without the padding."""
    tokens, _, mask = to_host(completion)
    return [
        row[keep].tolist() for row, keep in zip(tokens, mask.astype(bool), strict=True)
    ]


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


def check_settings(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    group_size: int = 1,
) -> None:
    """Raises ValueError naming the sampling setting that is out of range."""
    counts = dict(max_new_tokens=max_new_tokens, group_size=group_size)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature must be 0 (greedy) or positive, not {temperature}"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], where 1 is off, not {top_p}")


def check_tokens(name: str, tokens: Tokens, vocab_size: int) -> None:
    """Raises ValueError naming a token that the model does not embed."""
    for token in (min(tokens), max(tokens)) if len(tokens) else ():
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: token {token} is not in the model's vocabulary of "
                f"{vocab_size}"
            )


def check_prompts(prompts: Sequence[Tokens], config, max_new_tokens: int) -> None:
    """Raises ValueError naming a row that is empty, too long or out of vocabulary."""
    if not len(prompts):
        raise ValueError("there are no prompts")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} has no tokens; start it with BOS at least")
        check_tokens(f"prompt {row}", prompt, config.vocab_size)
        length = len(prompt) + max_new_tokens
        if length > config.max_position:
            raise ValueError(
                f"prompt {row} of {len(prompt)} tokens and max_new_tokens="
                f"{max_new_tokens} make {length} tokens; the model's context is "
                f"{config.max_position}"
            )


def bucket_length(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96, … so that few shapes compile."""
    bucket = 16
    while bucket < length:
        # From a power of two to one and a half of it, and on to the next power.
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def pad_prompts(
    prompts: Sequence[Tokens], total: int, longest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the left of int32 [total, P], and lengths int32 [total].

    P is the bucket of the longest one, or of `longest` if that is more. Filler rows
    behind them hold one token.
    """
    lengths = np.ones(total, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    width = bucket_length(max(longest, int(lengths.max())))
    tokens = np.zeros((total, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def place(tree: PyTree, mesh) -> PyTree:
    """NumPy arrays that every process has -> arrays cut over the mesh by rows."""
    if mesh is None:
        return tree
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, rows, lambda i: x[i]), tree
    )
