"""Array contracts between the rooms: NamedTuples only, each one a pytree.

Shape letters: B batch, T time, V vocab, D model, F mlp, N query heads, K kv heads,
H head dim, L layers, G group. Masks are True where a position counts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any


class TokenBatch(NamedTuple):
    """Rows of tokens; a row is one document, or several packed behind each other.

    Attributes:
      tokens: int32 [B, T].
      completion_mask: bool [B, T], True where the token is trained, that is
        predicted from the tokens before it. Never True on padding or on the first
        token of a segment.
      segment_ids: int32 [B, T], 0 on padding, documents numbered from 1.
      positions: int32 [B, T], restarting from 0 in each segment.
    """

    tokens: Array
    completion_mask: Array
    segment_ids: Array
    positions: Array


class PreferenceBatch(NamedTuple):
    """Pairs of completions of one prompt, in B parts that are computed apart.

    A part has up to P pairs, whose sides lie in any of its R rows: chosen and rejected
    completion of pair p, from 0, are the segments 2 p + 1 and 2 p + 2. A pair without
    a segment is filler and counts 0.

    Attributes:
      rows: TokenBatch, its arrays [B, R, T].
      margins: float32 [B, P], how much better the chosen one was judged; 0 if unknown.
      ref_chosen_logps, ref_rejected_logps: float32 [B, P], nats, summed over the
        completion under the frozen reference; 0 where no reference is used.
    """

    rows: TokenBatch
    margins: Array
    ref_chosen_logps: Array
    ref_rejected_logps: Array


class Completion(NamedTuple):
    """What a generator returns.

    Attributes:
      tokens: int32 [B, N], completion tokens, the stop token included; 0 after it.
      logps: float32 [B, N], nats, log-probability of each token under the sampler's
        distribution before top-k/top-p filtering; 0 where the mask is False.
      mask: bool [B, N], True for generated tokens, the stop token included.
    """

    tokens: Array
    logps: Array
    mask: Array


class Rollout(NamedTuple):
    """Prompts with sampled completions, scored: a batch for the online objectives.

    All arrays are [B, T] and aligned to the token index: `old_logps[b, t]` is
    log p(tokens[b, t] | tokens[b, :t]) and 0 outside the completion mask.

    Attributes:
      tokens, completion_mask, segment_ids, positions: as in TokenBatch.
      old_logps: float32, the trainer's log-probabilities at rollout time, nats; None
        where the policy is still the one that sampled, so that an objective takes its
        own log-probabilities, without their gradient.
      ref_logps: float32, the frozen reference's, nats; None where there is none.
      values: float32, the critic's value of the state before each token; None where
        there is no critic.
      advantages: float32, after whitening where it was asked for.
      returns: float32, advantages (before whitening) + values; None without a critic.
      sampler_logps: float32, the generator's, nats; None leaves out the metrics of how
        far trainer and generator are apart.
      routing: int [B, T, L, k], the experts of each token at the pass of old_logps, of
        a mixture of experts: the update takes the same; None lets its routers say.
    """

    tokens: Array
    completion_mask: Array
    segment_ids: Array
    positions: Array
    old_logps: Array | None
    ref_logps: Array | None
    values: Array | None
    advantages: Array
    returns: Array | None
    sampler_logps: Array | None = None
    routing: Array | None = None


class Loss(NamedTuple):
    """What an objective returns: the step divides once, by the global count.

    Attributes:
      sum: float32 [], the summed loss; differentiated.
      count: float32 [], what it is to be divided by (tokens, sequences or pairs).
      metrics: name -> (sum, count), each float32 []; reported as sum / count.
    """

    sum: Array
    count: Array
    metrics: Mapping[str, tuple[Array, Array]]


class TrainState(NamedTuple):
    """Everything a training step reads and writes.

    Attributes:
      step: int32 [], number of optimizer steps taken.
      params: nested dict of float32 arrays, layers stacked on axis 0.
      opt_state: the optax state.
      key: typed PRNG key [], split once per step.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    key: Array
