"""Rollouts: prompts -> completions -> rewards -> advantages, all on the host.

A rollout batch is whole on every process, as NumPy: [B, T] floats are small beside
the model, and so whitening and statistics are over the global batch by construction.
The models come in as functions (`Actors`); nothing here knows of parameters.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jalign import data, losses
from jalign.generate import continuations
from jalign.rewards.samples import RewardFn, Samples, reward_of, samples_of
from jalign.rewards.sums import add_up, mean_of_judged
from jalign.train.online_config import ScoreLimits
from jalign.types import Completion, PyTree, Rollout, TokenBatch

ROLLOUT_KL = "objective/kl"


class Actors(NamedTuple):
    """What a rollout asks of the models, from host arrays to host arrays.

    Attributes:
      sample: (policy params, P prompts, key) -> Completion [P * group_size, N], the
        completions of a prompt behind each other.
      policy: (policy params, TokenBatch) -> float32 [B, T], nats, the trainer's own;
        and the values of its head, float32 [B, T], or None.
      reference: TokenBatch -> float32 [B, T], nats, of the frozen reference; or None.
      critic: (critic params, TokenBatch) -> float32 [B, T]; or None.
      reward: (prompts, completions, rows) -> float32 [B], or [B, K] of K rewards;
        jalign.rewards.checked makes one that names the row whose reward is no finite
        number.
      tokenizer: the policy's.
      stop_tokens: ids that end a completion.
      row_lengths: padded lengths of rows; all of a rollout have the last one, and
        those of a step the first that holds them.
      reward_weights: name -> weight of each of the K rewards, in their order.
      group_size: completions of each prompt.
    """

    sample: Callable[[PyTree, Sequence[Any], jax.Array], Completion]
    policy: Callable[[PyTree, TokenBatch], tuple[np.ndarray, np.ndarray | None]]
    reference: Callable[[TokenBatch], np.ndarray] | None
    critic: Callable[[PyTree, TokenBatch], np.ndarray] | None
    reward: RewardFn
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    row_lengths: tuple[int, ...]
    reward_weights: Mapping[str, float] = {"reward": 1.0}
    group_size: int = 1


class Scored(NamedTuple):
    """Completions of a batch of prompts, with what both policies and a judge say.

    Attributes:
      batch: TokenBatch [B, T], prompt and completion in a row.
      logps: float32 [B, T], nats, the sampling policy's, by the trainer; None where
        they were not asked for.
      sampler_logps: float32 [B, T], nats, the same by the sampler; 0 elsewhere.
      ref_logps: float32 [B, T], nats; None without a reference.
      rewards: float32 [B], as the judge gave them, weighted and summed.
      stopped: bool [B], ended by a stop token and not by the length limit.
      texts: the B completions as text.
      reward_parts: name -> float32 [B], before its weight; NaN where not judged.
      values: float32 [B, T], of the policy's value head, by the pass of `logps`; None
        where there is no such head or no such pass.
    """

    batch: TokenBatch
    logps: np.ndarray | None
    sampler_logps: np.ndarray
    ref_logps: np.ndarray | None
    rewards: np.ndarray
    stopped: np.ndarray
    texts: list[str]
    reward_parts: Mapping[str, np.ndarray] = {}
    values: np.ndarray | None = None


def join(
    prompts: Sequence[Sequence[int]], completion: Completion, length: int
) -> TokenBatch:
    """Prompts and completions in rows, padded on the right.

    Args:
      prompts: B token id sequences.
      completion: host arrays [B, N]; the mask alone says what was generated, so that
        a token that equals the pad id counts like any other.
      length: T, no shorter than any prompt with its completion.

    Returns: TokenBatch [B, T], completion_mask True on the completions.
    """
    shape = (len(prompts), length)
    tokens, used, mask = (np.zeros(shape, kind) for kind in (np.int32, bool, bool))
    for row, prompt in enumerate(prompts):
        new = completion.tokens[row][completion.mask[row]]
        start, end = len(prompt), len(prompt) + len(new)
        tokens[row, :end] = [*prompt, *new]
        used[row, :end], mask[row, start:end] = True, True
    positions = np.arange(length, dtype=np.int32) * used
    return TokenBatch(tokens, mask, used.astype(np.int32), positions.astype(np.int32))


def ended(completion: Completion, stop_tokens: Sequence[int]) -> np.ndarray:
    """bool [B]: the last generated token is a stop token. Host arrays [B, N]."""
    stops = np.isin(completion.tokens, stop_tokens) & completion.mask
    return np.asarray(np.any(stops, axis=1))


def sample_and_score(
    actors: Actors,
    policy_params: PyTree,
    examples: Sequence[data.PromptExample],
    key: jax.Array,
    *,
    with_logps: bool = True,
) -> Scored:
    """group_size completions of each prompt, their rewards and log-probabilities.

    Args:
      actors: who samples and judges.
      policy_params: the policy's.
      examples: the prompts.
      key: PRNG key [], of the sampling.
      with_logps: make the trainer's pass of the policy over the completions.
    """
    prompts = [example.tokens.tolist() for example in examples]
    completion = actors.sample(policy_params, prompts, key)
    examples = in_groups(examples, actors.group_size)
    prompts = in_groups(prompts, actors.group_size)
    batch = join(prompts, completion, actors.row_lengths[-1])
    rows = zip(completion.tokens, completion.mask, strict=True)
    ids = [tokens[mask].tolist() for tokens, mask in rows]
    known = actors.tokenizer, actors.stop_tokens
    texts = continuations(known[0], prompts, ids, known[1])
    samples = samples_of(examples, ids, texts, *known)
    rewards, parts = judge(actors, samples)
    sampler_logps = np.zeros(batch.tokens.shape, np.float32)
    sampler_logps[batch.completion_mask] = completion.logps[completion.mask]
    logps, values = None, None
    if with_logps:
        logps, values = actors.policy(policy_params, batch)
    return Scored(
        batch,
        logps,
        sampler_logps,
        ref_logps=actors.reference(batch) if actors.reference else None,
        rewards=rewards,
        stopped=ended(completion, actors.stop_tokens),
        texts=samples.completions,
        reward_parts=parts,
        values=values,
    )


def in_groups(items: Sequence[Any], group_size: int) -> list[Any]:
    """Each item group_size times, behind each other."""
    return [item for item in items for _ in range(group_size)]


def judge(actors: Actors, samples: Samples) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(weighted sum of the rewards [B], each reward [B] by name)."""
    values = reward_of(actors.reward, samples)
    columns = np.asarray(values, np.float32).reshape(len(samples.completions), -1)
    parts = dict(zip(actors.reward_weights, columns.T, strict=True))
    return add_up(columns, list(actors.reward_weights.values())), parts


def shape_scores(
    rewards: np.ndarray, stopped: np.ndarray, options: ScoreLimits
) -> np.ndarray:
    """The rewards clipped, then less the penalty where the completion never stopped.

    The penalty comes last, so that clipping cannot hide it.

    Args:
      rewards: float32 [B].
      stopped: bool [B].
      options: which of the two happens.

    Returns: float32 [B].
    """
    scores = rewards
    if options.reward_clip is not None:
        scores = np.clip(scores, -options.reward_clip, options.reward_clip)
    if options.missing_eos_penalty is not None:
        scores = np.where(stopped, scores, scores - options.missing_eos_penalty)
    return scores.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("whiten_rewards", "whiten_advantages"))
def estimate_advantages(
    scores: jax.Array,
    logps: jax.Array,
    ref_logps: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """KL-shaped token rewards, then GAE, then whitening.

    The score stands on the completion's last token, and -kl_coef * kl_k1 on every
    one. Returns are made of the advantages *before* whitening.

    Args:
      scores: float32 [B].
      logps, ref_logps, values: float32 [B, T].
      mask: bool [B, T], the completions.
      kl_coef, gamma, gae_lambda: scalars.
      whiten_rewards: divide the token rewards by their deviation; their mean stays.
      whiten_advantages: to mean 0 and variance 1 over the whole batch.

    Returns: (advantages, returns), float32 [B, T], 0 outside the mask.
    """
    rewards = losses.kl_shaped_rewards(scores, logps, ref_logps, mask, beta=kl_coef)
    if whiten_rewards:
        rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.gae(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    if whiten_advantages:
        advantages = losses.masked_whiten(advantages, mask)
    return advantages, jnp.where(mask, returns, 0.0)


def make_rollout(
    scored: Scored, scores: np.ndarray, values: np.ndarray, **options: Any
) -> Rollout:
    """The batch for the objectives; options as in estimate_advantages. Host arrays."""
    mask = scored.batch.completion_mask
    advantages, returns = estimate_advantages(
        scores, scored.logps, scored.ref_logps, values, mask, **options
    )
    return Rollout(
        *scored.batch,
        old_logps=scored.logps,
        ref_logps=scored.ref_logps,
        values=values,
        advantages=np.asarray(advantages),
        returns=np.asarray(returns),
    )


def reference_kl(scored: Scored) -> np.ndarray:
    """float32 [B], nats: the sum of kl_k1 to the reference over each completion."""
    assert scored.ref_logps is not None, "there is no reference"
    # Without the policy's own pass the sampler's numbers stand in.
    logps = scored.sampler_logps if scored.logps is None else scored.logps
    k1 = np.asarray(losses.kl_k1(logps, scored.ref_logps))
    return np.where(scored.batch.completion_mask, k1, 0.0).sum(axis=1)


def rollout_metrics(
    scored: Scored, scores: np.ndarray, *, kl_coef: float
) -> dict[str, float]:
    """Averages over the completions of a rollout, named as TRL's PPO names them.

    `objective/kl`, in nats a completion, is the sum of kl_k1 over its tokens;
    `objective/entropy` the sum of -log p. `reward` is the judge's own, before
    clipping and penalty; `objective/scores` is after them.
    """
    mask, kl = scored.batch.completion_mask, reference_kl(scored)
    assert scored.logps is not None, "the policy's pass was left out"
    gaps = np.abs(scored.logps - scored.sampler_logps)[mask]
    lengths = mask.sum(axis=1)
    penalty = -kl_coef * kl.mean()
    means = {
        ROLLOUT_KL: kl.mean(),
        "objective/entropy": -np.where(mask, scored.logps, 0.0).sum(axis=1).mean(),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + scores.mean(),
        "objective/scores": scores.mean(),
        "objective/kl_coef": kl_coef,
        "reward": scored.rewards.mean(),
        "reward_std": scored.rewards.std(),
        "val/num_eos_tokens": scored.stopped.sum(),
        "completions/mean_length": lengths.mean(),
        "completions/clipped_ratio": 1.0 - scored.stopped.mean(),
        "sampling/sampling_logp_difference/max": np.max(gaps, initial=0.0),
    }
    if len(scored.reward_parts) > 1:
        for name, part in scored.reward_parts.items():
            means[f"rewards/{name}/mean"] = mean_of_judged(part)
    return {name: float(value) for name, value in means.items()}
