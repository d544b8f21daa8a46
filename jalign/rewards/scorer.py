"""Rewards from a reward checkpoint: the score at the last token of each answer.

A reward model is given what it was trained on: the conversation in its own chat
template, or prompt + completion + EOS, and is read at the last token of that. Where
this begins with the very tokens that the policy was asked with, the sampled ids follow
them, and no text comes between.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import data, sharding
from jalign.data.encoding import encode_exchanges, encode_prompts
from jalign.data.formats import Exchange, Prompt, parse_prompt
from jalign.data.rows import RowError
from jalign.data.special_tokens import turn_end, turn_tail
from jalign.data.tokenizer import encode_plain
from jalign.models import Model
from jalign.rewards.samples import RewardFn, Samples, Tokens
from jalign.types import PyTree

_log = logging.getLogger("jalign.rewards")


def model_reward(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> RewardFn:
    """Scores completions by a reward model, as it was trained on them.

    Args:
      model: a model with num_labels=1.
      params: its parameters.
      tokenizer: the reward model's own.
      max_length: tokens; a longer text keeps its start, as in training, and a warning
        says so. None means the model's context.
      batch_size: rows scored at once (global).

    Returns: a RewardFn that takes `samples`. Without them a prompt is the conversation
      that its row holds, else the text.
    """
    limit = max_length or model.config.max_position

    def reward(prompts, completions, rows, *, samples: Samples | None = None):
        if samples is None:
            sources = [_source(p, r) for p, r in zip(prompts, rows, strict=True)]
            samples = Samples(prompts, completions, rows, sources, (), (), None, ())
        sequences = judged_tokens(tokenizer, samples)
        long = sum(len(ids) > limit for ids in sequences)
        if long:
            _log.warning(
                "%d of %d texts are longer than the reward model's %d tokens: it is "
                "read where they are cut",
                long,
                len(sequences),
                limit,
            )
        cut = [ids[:limit] for ids in sequences]
        return score_tokens(model, params, cut, batch_size=batch_size)

    return reward


def judged_tokens(tokenizer: Any, samples: Samples) -> list[np.ndarray]:
    """What a reward model reads of each sample, up to the token that it is read at.

    Args:
      tokenizer: the reward model's own.
      samples: without token ids everything is encoded from its text.

    Returns: B arrays int32 [T].
    Raises: ValueError naming the row that the reward model's chat template refuses.
    """
    sources = [
        source or Prompt(text, {})
        for source, text in zip(samples.sources, samples.prompts, strict=True)
    ]
    own = encode_prompts(tokenizer, sources)
    found = _sampled(tokenizer, samples, sources, own)
    todo = [row for row in range(len(sources)) if row not in found]
    exchanges = []
    for row in todo:
        text, prompt = samples.completions[row], own[row]
        if isinstance(prompt, RowError) or prompt[0] != samples.prompts[row]:
            text = (
                text.strip()
            )  # it belongs to the policy's template, not to the answer
        exchanges.append(_exchange(sources[row], text))
    encoded = encode_exchanges(exchanges, tokenizer, eos_inside=True, keep_tail=True)
    for row, example in zip(todo, encoded, strict=True):
        if isinstance(example, RowError):
            raise ValueError(f"the reward model cannot be given row {row}: {example}")
        found[row] = example.tokens
    return [found[row] for row in range(len(sources))]


def _sampled(
    tokenizer: Any, samples: Samples, sources: Sequence[Prompt], own: Sequence[Any]
) -> dict[int, np.ndarray]:
    """Row -> sampled ids as the reward model would have them, where it would."""
    ours = samples.tokenizer
    if ours is None or ours.get_vocab() != tokenizer.get_vocab():
        return {}
    chat_end = turn_end(tokenizer) and encode_plain(tokenizer, [turn_tail(tokenizer)])
    found = {}
    for row, (source, prompt) in enumerate(zip(sources, own, strict=True)):
        is_text = isinstance(source.prompt, str)
        end = [np.array([tokenizer.eos_token_id], np.int32)] if is_text else chat_end
        same = not isinstance(prompt, RowError) and np.array_equal(
            prompt[1], samples.prompt_ids[row]
        )
        if same and end:
            ids = list(samples.completion_ids[row])
            if ids and ids[-1] in samples.stop_tokens:
                ids.pop()
            parts = [samples.prompt_ids[row], ids, end[0]]
            found[row] = np.concatenate(parts).astype(np.int32)
    return found


def _exchange(source: Prompt, completion: str) -> Exchange:
    if isinstance(source.prompt, str):
        return Exchange(source.prompt, completion, {})
    turn = {"role": "assistant", "content": completion}
    return Exchange(source.prompt, [turn], source.template_args)


def _source(prompt: str, row: dict[str, Any]) -> Prompt:
    """The conversation that a row asks with; else the prompt's text."""
    try:
        found = parse_prompt(row)
    except RowError:
        return Prompt(prompt, {})
    return found if isinstance(found.prompt, list) else Prompt(prompt, {})


def score_tokens(
    model: Model,
    params: PyTree,
    sequences: Sequence[Tokens],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """The reward model's score at the last token of each sequence.

    Every process passes the same sequences and gets all the scores.

    Args:
      model: a model with num_labels=1.
      params: its parameters.
      sequences: B token sequences, each with at least one token.
      batch_size: rows scored at once (global).

    Returns: float32 [B] NumPy.
    Raises: ValueError for a model without a score head, an empty sequence, or a score
      that is not finite, naming the row.
    """
    if model.config.num_labels != 1:
        raise ValueError("score_tokens needs a reward model (num_labels=1)")
    empty = [row for row, tokens in enumerate(sequences) if not len(tokens)]
    if empty:
        raise ValueError(f"sequence {empty[0]} has no tokens to score")
    parts = [
        sharding.gather(_score(params, *_pad(part, batch_size), model=model))
        for part in _parts(sequences, batch_size)
    ]
    scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    scores = scores[: len(sequences)]
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(f"the reward model gave {scores[bad[0]]} for row {bad[0]}")
    return scores


def _parts(sequences: Sequence, size: int):
    return (sequences[i : i + size] for i in range(0, len(sequences), size))


def _pad(sequences: Sequence[Tokens], rows: int):
    """Tokens int32 [rows, T] and lengths int32 [rows], of few different shapes."""
    lengths = np.ones(rows, np.int32)
    lengths[: len(sequences)] = [len(tokens) for tokens in sequences]
    longest = int(lengths.max())
    width = data.bucket_length(longest, 1 << 30)
    tokens = np.zeros((rows, width), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return tokens, lengths


@partial(jax.jit, static_argnames="model")
def _score(params, tokens, lengths, *, model):
    tokens = sharding.constrain(tokens, model.mesh, "batch", None)
    hidden, _ = model.apply(params, tokens)
    scores = model.score(params, hidden)
    return jnp.take_along_axis(scores, (lengths - 1)[:, None], axis=1)[:, 0]
