"""Prompts in, completions out.

Prompts are padded on the right; a prompt goes through the model once, however many
completions are asked of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding
from jalign.generate.decode import complete
from jalign.generate.inputs import (
    Tokens,
    bucket_length,
    check_prompts,
    check_settings,
    check_tokens,
    pad_prompts,
    place,
)
from jalign.generate.sampling import row_keys, sampler_for
from jalign.models import Model
from jalign.types import Completion, PyTree


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
      model: a causal language model; the devices of its mesh, if any, share the rows,
        with the parameters laid out anew, see sharding.decoding_mesh.
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
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_settings(max_new_tokens=max_new_tokens, group_size=group_size, **sampling)
    check_tokens("stop_tokens", stop_tokens, model.config.vocab_size)
    check_prompts(prompts, model.config, max_new_tokens)
    rows = max(len(prompts), pad_to[0]) * group_size
    longest = max(pad_to[1], *map(len, prompts))
    model, laid_out = model.on_decoding_mesh(params, rows, longest + max_new_tokens)
    size = {"max_new_tokens": max_new_tokens, "group_size": group_size}
    more = {"pad_to": pad_to, "stop_tokens": stop_tokens}
    return _generate(
        model, laid_out(params), prompts, key=key, **size, **more, **sampling
    )


def _generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    pad_to: tuple[int, int],
    stop_tokens: Sequence[int],
    group_size: int = 1,
    **sampling: Any,
) -> Completion:
    """`generate` with the model on its decoding mesh, and parameters laid out on it."""
    asked, padded = len(prompts) * group_size, max(len(prompts), pad_to[0])
    parts = sharding.batch_parts(model.mesh)
    total = -(-padded // parts) * parts
    tokens, lengths = pad_prompts(prompts, total, pad_to[1])
    keys = row_keys(key, asked, total * group_size)
    stops = np.asarray(stop_tokens, np.int32).reshape(-1)
    draw, scalars = sampler_for(**sampling)
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


def lower(
    model: Model,
    params: PyTree,
    *,
    prompts: int,
    longest: int,
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Any:
    """The program of `generate` for a mesh that need not be here, to be compiled.

    Args:
      model: on its decoding mesh, see Model.on_decoding_mesh.
      params: their shapes there, with shardings.
      prompts, longest: how many, and the tokens of the longest one.
      max_new_tokens, group_size, temperature, top_k, top_p: as in `generate`.

    Returns: jax.stages.Lowered.
    """
    parts = sharding.batch_parts(model.mesh)
    total, rows = -(-prompts // parts) * parts, prompts * group_size
    cut = None if model.mesh is None else sharding.batch_sharding(model.mesh)
    array = partial(jax.ShapeDtypeStruct, sharding=cut)
    key = jax.random.key(0)
    data = jax.random.key_data(key)
    batch = (
        array((total, bucket_length(longest)), jnp.int32),
        array((total,), jnp.int32),
        array((total * group_size, *data.shape), data.dtype),
    )
    draw, scalars = sampler_for(temperature, top_k, top_p)
    return complete.lower(  # pyright: ignore[reportFunctionMemberAccess]
        params,
        batch,
        (scalars, np.zeros(1, np.int32), np.int32(rows)),
        model=model,
        draw=draw,
        key_impl=str(jax.random.key_impl(key)),
        rows=rows,
        max_new_tokens=max_new_tokens,
    )


def generate_lists(
    model: Model,
    params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    batch_size: int = 64,
    stop_tokens: Sequence[int] = (),
    **settings: Any,
) -> list[list[int]]:
    """`generate`, at most batch_size prompts at once; a row does not depend on that.

    Args:
      model, params, prompts, key: as in `generate`.
      batch_size: prompts decoded together (global).
      max_new_tokens, stop_tokens, **settings: as in `generate`.

    Returns: each prompt's completion, token ids with the stop token, on the host.
    Raises: as `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check_settings(max_new_tokens=max_new_tokens, **settings)
    check_tokens("stop_tokens", stop_tokens, model.config.vocab_size)
    check_prompts(prompts, model.config, max_new_tokens)
    size, longest = min(batch_size, len(prompts)), max(map(len, prompts))
    model, laid_out = model.on_decoding_mesh(params, size, longest + max_new_tokens)
    params = laid_out(params)
    keys = row_keys(key, len(prompts), len(prompts))
    impl = jax.random.key_impl(key)
    pad_to = size, longest  # one shape for all parts: one compilation
    completions: list[list[int]] = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        part = _generate(
            model,
            params,
            prompts[rows],
            key=jax.random.wrap_key_data(jnp.asarray(keys[rows]), impl=impl),
            max_new_tokens=max_new_tokens,
            pad_to=pad_to,
            stop_tokens=stop_tokens,
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
