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
from jalign.data.chat import join_turns
from jalign.data.encoding import encode_prompts
from jalign.data.formats import Prompt
from jalign.data.rows import RowError
from jalign.data.special_tokens import split_turn
from jalign.data.templates import render
from jalign.data.tokenizer import encode_pairs, encode_plain, turn_tail_ids
from jalign.models import Model
from jalign.rewards.samples import (
    RewardFn,
    Samples,
    Tokens,
    samples_of_texts,
    sources_of,
)
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
        known = samples or samples_of_texts(prompts, completions, rows)
        sequences = judged_tokens(tokenizer, known)
        long = sum(len(ids) > limit for ids in sequences)
        if long:
            counts = long, len(sequences), limit
            _log.warning(
                "%d of %d texts are longer than the reward model's %d tokens: it is "
                "read where they are cut",
                *counts,
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
    sources = sources_of(samples)
    own = encode_prompts(tokenizer, sources)
    found = _sampled(tokenizer, samples, sources, own)
    for row, (source, prompt) in enumerate(zip(sources, own, strict=True)):
        if row in found:
            continue
        same = not isinstance(prompt, RowError) and prompt[0] == samples.prompts[row]
        asked = samples.prompts[row] if same else None
        try:
            found[row] = _encoded(tokenizer, source, asked, samples.completions[row])
        except RowError as error:
            message = f"the reward model cannot be given row {row}: {error}"
            raise ValueError(message) from None
    return [found[row] for row in range(len(sources))]


def _encoded(
    tokenizer: Any, source: Prompt, asked: str | None, completion: str
) -> np.ndarray:
    """A prompt with its answer, from their texts, to where the template ends.

    Args:
      asked: the prompt's text where the policy's template is this one.
    """
    if isinstance(source.prompt, str):
        return encode_pairs(tokenizer, [(source.prompt, completion)])[0][0]
    head, tail = split_turn(tokenizer)
    if asked is not None and head:
        space = tail[: len(tail) - len(tail.lstrip())]  # may be sampled, see _closed
        text = asked + completion.removesuffix(space) + tail
        return encode_plain(tokenizer, [text])[0]
    # White space around an answer is its policy's template's, not the answer's.
    answer = {"role": "assistant", "content": completion.strip()}
    turns, _ = join_turns(source.prompt, [answer])
    return encode_plain(tokenizer, [render(tokenizer, turns, source.template_args)])[0]


def _sampled(
    tokenizer: Any, samples: Samples, sources: Sequence[Prompt], own: Sequence[Any]
) -> dict[int, np.ndarray]:
    """Row -> sampled ids as the reward model would have them, where it would."""
    ours, vocab = samples.tokenizer, tokenizer.get_vocab()
    if ours is None or ours.get_vocab() != vocab:
        return {}
    largest, chat_tail = max(vocab.values()), turn_tail_ids(tokenizer)
    text_tail = np.array([tokenizer.eos_token_id], np.int32)
    found = {}
    for row, (source, prompt) in enumerate(zip(sources, own, strict=True)):
        tail = text_tail if isinstance(source.prompt, str) else chat_tail
        asked = np.asarray(samples.prompt_ids[row], np.int32)
        ids = list(samples.completion_ids[row])
        if ids and ids[-1] in samples.stop_tokens:
            ids.pop()
        # An embedding may be larger than the vocabulary: such an id is no text.
        known = max(ids, default=0) <= largest
        same = not isinstance(prompt, RowError) and np.array_equal(prompt[1], asked)
        if same and known and tail is not None:
            found[row] = np.concatenate([asked, _closed(ids, tail.tolist(), samples)])
    return found


def _closed(ids: list[int], tail: list[int], samples: Samples) -> np.ndarray:
    """A completion with the template's tail, of which it may have sampled the start.

    LLaMA-2's template writes a space before the end of a turn, so a policy learns to.
    """
    before = next((i for i, x in enumerate(tail) if x in samples.stop_tokens), 0)
    if before and ids[-before:] == tail[:before]:
        ids = ids[:-before]
    return np.array([*ids, *tail], np.int32)


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
    examples = [
        data.Example(np.asarray(tokens, np.int32), np.zeros(len(tokens), bool))
        for tokens in sequences
    ]
    examples += [data.filler(examples[0])] * (rows - len(examples))
    width = data.bucket_length(max(map(len, sequences)), 1 << 30)
    batch = data.collate_tokens(examples, width)
    return batch.tokens, np.maximum((batch.segment_ids > 0).sum(1), 1).astype(np.int32)


@partial(jax.jit, static_argnames="model")
def _score(params, tokens, lengths, *, model):
    tokens = sharding.constrain(tokens, model.mesh, "batch", None)
    hidden, _ = model.apply(params, tokens)
    scores = model.score(params, hidden)
    return jnp.take_along_axis(scores, (lengths - 1)[:, None], axis=1)[:, 0]
