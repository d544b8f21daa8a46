"""Rollouts: prompts -> completions -> rewards and log-probabilities, all on the host.

A rollout batch is whole on every process, as NumPy: [B, T] floats are small beside
the model, and so whitening and statistics are over the global batch by construction.
The models come in as functions (`RolloutFunctions`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jalign import data, losses
from jalign.generate import continuations
from jalign.rewards.samples import RewardFn, Samples, reward_of, samples_of
from jalign.rewards.sums import add_up, mean_of_judged
from jalign.train.evaluations import Evaluation
from jalign.train.online_config import OnlineConfig, ScoreLimits
from jalign.types import Completion, PyTree, TokenBatch

ROLLOUT_KL = "objective/kl"
GOLD = "--eval-reward"  # no term of a --reward is called so
_EVAL_STREAM = 2**31 - 1  # no iteration gets as far, so no rollout uses its key
_SAMPLES = 8  # completions kept for the report


class RolloutFunctions(NamedTuple):
    """What a rollout asks of the models, from host arrays to host arrays.

    Attributes:
      sample: (policy params, P prompts, key) -> Completion [P * group_size, N], the
        completions of a prompt behind each other.
      score: (params of the policy and of its critic by name, TokenBatch, with_logps) ->
        "policy": log-probabilities, float32 [B, T], nats, the trainer's own, and the
        values of its head or None, where with_logps; "reference": float32 [B, T],
        nats, where there is one; "critic": values, float32 [B, T], where it is given.
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
    score: Callable[[Mapping[str, PyTree], TokenBatch, bool], dict[str, Any]]
    reward: RewardFn
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    row_lengths: tuple[int, ...]
    reward_weights: Mapping[str, float] = {"reward": 1.0}
    group_size: int = 1


class Scored(NamedTuple):
    """Completions of a batch of prompts, with what both policies and a reward say.

    Attributes:
      batch: TokenBatch [B, T], prompt and completion in a row.
      logps: float32 [B, T], nats, the sampling policy's, by the trainer; None where
        they were not asked for.
      sampler_logps: float32 [B, T], nats, the same by the sampler; 0 elsewhere.
      ref_logps: float32 [B, T], nats; None without a reference.
      rewards: float32 [B], as they were given, weighted and summed.
      stopped: bool [B], ended by a stop token and not by the length limit.
      texts: the B completions as text.
      reward_parts: name -> float32 [B], before its weight; NaN where not judged.
      values: float32 [B, T], of the critic or of the policy's value head, then by the
        pass of `logps`; None without either.
      routing: int [B, T, L, k], the experts of each token in the pass of `logps`; None
        without a mixture of them.
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
    routing: np.ndarray | None = None


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
    functions: RolloutFunctions,
    params: Mapping[str, PyTree],
    examples: Sequence[data.PromptExample],
    key: jax.Array,
    *,
    with_logps: bool = True,
) -> Scored:
    """group_size completions of each prompt, their rewards and log-probabilities.

    Args:
      functions: of make_functions.
      params: of the "policy" and, where its values are wanted, of the "critic".
      examples: the prompts.
      key: PRNG key [], of the sampling.
      with_logps: make the trainer's pass of the policy over the completions.
    """
    prompts = [example.tokens.tolist() for example in examples]
    completion = functions.sample(params["policy"], prompts, key)
    examples = in_groups(examples, functions.group_size)
    prompts = in_groups(prompts, functions.group_size)
    batch = join(prompts, completion, functions.row_lengths[-1])
    rows = zip(completion.tokens, completion.mask, strict=True)
    ids = [tokens[mask].tolist() for tokens, mask in rows]
    tokenizer, stops = functions.tokenizer, functions.stop_tokens
    texts = continuations(tokenizer, prompts, ids, stops)
    samples = samples_of(examples, ids, texts, tokenizer, stops)
    rewards, parts = weighted_rewards(functions, samples)
    sampler_logps = np.zeros(batch.tokens.shape, np.float32)
    sampler_logps[batch.completion_mask] = completion.logps[completion.mask]
    passed = functions.score(params, batch, with_logps)
    logps, values, routing = passed.get("policy", (None, None, None))
    return Scored(
        batch,
        logps,
        sampler_logps,
        ref_logps=passed.get("reference"),
        rewards=rewards,
        stopped=ended(completion, stops),
        texts=samples.completions,
        reward_parts=parts,
        values=passed.get("critic", values),
        routing=routing,
    )


def in_groups(items: Sequence[Any], group_size: int) -> list[Any]:
    """Each item group_size times, behind each other."""
    return [item for item in items for _ in range(group_size)]


def weighted_rewards(
    functions: RolloutFunctions, samples: Samples
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(weighted sum of the rewards [B], each reward [B] by name)."""
    values = reward_of(functions.reward, samples)
    columns = np.asarray(values, np.float32).reshape(len(samples.completions), -1)
    parts = dict(zip(functions.reward_weights, columns.T, strict=True))
    return add_up(columns, list(functions.reward_weights.values())), parts


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


def reference_kl(scored: Scored) -> np.ndarray:
    """float32 [B], nats: the sum of kl_k1 to the reference over each completion."""
    assert scored.ref_logps is not None, "there is no reference"
    # Without the policy's own pass the sampler's numbers stand in.
    logps = scored.sampler_logps if scored.logps is None else scored.logps
    k1 = np.asarray(losses.kl_k1(logps, scored.ref_logps))
    return np.where(scored.batch.completion_mask, k1, 0.0).sum(axis=1)


def common_metrics(scored: Scored) -> dict[str, Any]:
    """What every algorithm tells of a rollout; `reward` is before clipping and penalty,
    `objective/kl`, where there is a reference, in nats a completion."""
    found = {
        "reward": scored.rewards.mean(),
        "completions/mean_length": scored.batch.completion_mask.sum(axis=1).mean(),
        "completions/clipped_ratio": 1.0 - scored.stopped.mean(),
    }
    if scored.ref_logps is not None:
        found[ROLLOUT_KL] = reference_kl(scored).mean()
    return found


def evaluate_prompts(
    functions: RolloutFunctions,
    params: PyTree,
    prompts: Sequence[data.PromptExample],
    config: OnlineConfig,
) -> Evaluation:
    """Samples one completion for each prompt, with the same draw every time.

    The figures are means over the prompts: reward, gold_reward where there is an
    eval_reward, each of several rewards, kl (to the reference where there is one, nats
    a completion), completion_length (tokens), stopped (share).

    Args:
      functions: of make_functions, with groups of one.
      params: the policy's.
      prompts: held-out ones; none gives no figures.
      config: for the seed, the batch size, and whether there is a reference.
    """
    if not prompts:
        return Evaluation({}, [])
    key = jax.random.fold_in(jax.random.key(config.seed), _EVAL_STREAM)
    rows = config.completions  # as many as a rollout has
    parts = [
        sample_and_score(
            functions,
            {"policy": params},
            prompts[start : start + rows],
            jax.random.fold_in(key, number),
            with_logps=config.has_reference,  # they are read for the KL alone
        )
        for number, start in enumerate(range(0, len(prompts), rows))
    ]

    def mean(of) -> float:
        return float(np.concatenate([of(part) for part in parts]).mean())

    figures = {"reward": mean(lambda x: x.rewards)}
    names = [name for name in functions.reward_weights if name != GOLD]
    if GOLD in functions.reward_weights:
        figures["gold_reward"] = mean(lambda x: x.reward_parts[GOLD])
    for name in names if len(names) > 1 else ():
        column = np.concatenate([part.reward_parts[name] for part in parts])
        figures[f"rewards/{name}"] = mean_of_judged(column)
    if config.has_reference:
        figures["kl"] = mean(reference_kl)
    figures |= {
        "completion_length": mean(lambda x: x.batch.completion_mask.sum(1)),
        "stopped": mean(lambda x: x.stopped),
    }
    return Evaluation(figures, parts[0].texts[:_SAMPLES])
