"""Measures of a model: held-out loss, preference accuracy, KL, reward, sample texts.

Every function is collective: with several processes, each calls it with the same
prompts (or with its own rows of the same batches) and gets the same numbers.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import data, forward, losses, sharding
from jalign.generate import generate_lists
from jalign.models import Model
from jalign.rewards import RewardFn, reward_of
from jalign.texts import Prompt, Tokens, sample_completions, sample_texts
from jalign.types import PreferenceBatch, PyTree, TokenBatch

_NO_LIMIT = 1 << 30
__all__ = [
    "eval_loss",
    "kl_of_samples",
    "kl_to_reference",
    "mean_reward",
    "preference_accuracy",
    "sample_texts",
]


def eval_loss(
    model: Model, params: PyTree, batches: Iterable[TokenBatch]
) -> dict[str, float]:
    """Cross-entropy of the trained tokens of held-out batches.

    Args:
      model: a causal language model.
      params: its parameters.
      batches: TokenBatches of this process's rows (NumPy), as a data loader gives.

    Returns: `loss` (nats per token, over all tokens of all batches), `perplexity`,
      `num_tokens`.
    Raises: ValueError if no token is trained.
    """
    placed = (sharding.put_batch(batch, model.mesh) for batch in batches)
    sums = (_loss_sums(params, batch, model=model) for batch in placed)
    total, count = _totals(sums, 2)
    if count == 0:
        raise ValueError("the evaluation data has no trained token")
    loss = total / count
    perplexity = float(np.exp(min(loss, 700.0)))  # float64 ends at exp(709)
    return {"loss": loss, "perplexity": perplexity, "num_tokens": count}


def _words(name: str, number: int):
    """What is compiled, of the batch that is the argument of this number."""
    return lambda *args, **_: sharding.batch_words(name, args[number])


_evaluation = partial(
    sharding.announced, words=_words("the evaluation", 1), static_argnames="model"
)


@_evaluation
def _loss_sums(params, batch, *, model):
    logps = forward.token_logps(model, params, batch)
    total, count = losses.token_mean(-logps, batch.completion_mask)
    return jnp.stack([total, count])


def preference_accuracy(
    model: Model,
    params: PyTree,
    batches: Iterable[PreferenceBatch],
    *,
    beta: float = 1.0,
) -> dict[str, float]:
    """How often the chosen completion gets the higher reward.

    A reward model (num_labels=1) scores the last token. A language model gives DPO's
    implicit reward, beta * (log p - ref log p) summed over the completion; with the
    reference log-probs at 0 that is how much likelier it finds the completion.

    Args:
      model, params: the model.
      batches: PreferenceBatches of this process's rows (NumPy). Filler counts
        nothing.
      beta: scale of the implicit reward.

    Returns: `accuracy` (ties count one half), `margin` (mean reward of chosen minus
      rejected), `log_loss` (nats, mean of -log sigmoid(margin): how likely a
      Bradley-Terry judge would be to choose so), `num_pairs`.
    Raises: ValueError if there is no pair.
    """
    placed = (sharding.put_batch(batch, model.mesh) for batch in batches)
    sums = (_margin_sums(params, batch, beta, model=model) for batch in placed)
    right, margin, log_loss, count = _totals(sums, 4)
    if count == 0:
        raise ValueError("the evaluation data has no pairs")
    means = {"accuracy": right, "margin": margin, "log_loss": log_loss}
    return {name: x / count for name, x in means.items()} | {"num_pairs": count}


@_evaluation
def _margin_sums(params, batch: PreferenceBatch, beta, *, model):
    if model.config.num_labels:
        chosen, rejected = forward.pair_rewards(model, params, batch)
    else:
        chosen, rejected = forward.pair_logps(model, params, batch)
        chosen = beta * (chosen - batch.ref_chosen_logps)
        rejected = beta * (rejected - batch.ref_rejected_logps)
    valid = forward.valid_pairs(batch)
    margin = jnp.where(valid, chosen - rejected, 0.0)
    right = jnp.where(valid, (margin > 0) + 0.5 * (margin == 0), 0.0)
    log_loss = jnp.where(valid, jax.nn.softplus(-margin), 0.0)
    return jnp.stack([x.sum() for x in (right, margin, log_loss, valid)])


def kl_to_reference(
    model: Model,
    params: PyTree,
    ref_params: PyTree,
    prompts: Sequence[Tokens],
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    ref_model: Model | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """KL(policy || reference) on the policy's own samples, by k1 and by k3.

    Args:
      model, params: the policy.
      ref_params, ref_model: the reference; the same model where that is None.
      prompts: token ids.
      key: PRNG key.
      max_new_tokens, batch_size: as in `generate.generate_lists`.
      stop_tokens: token ids; None means all that the model's config names.
      temperature: of the sampling, > 0; both models' log-probs are taken at it.

    Returns: in nats `kl_per_sequence`, `kl_per_token` (k1, may be negative) and
      `kl_k3_per_sequence`, `kl_k3_per_token` (k3, never negative), and
      `kl_num_tokens`, of the samples.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    if temperature <= 0:
        raise ValueError("the KL is estimated from samples: temperature must be > 0")
    if stop_tokens is None:
        stop_tokens = model.config.eos_token_ids
    how: dict[str, Any] = dict(temperature=temperature, batch_size=batch_size)
    sampling = dict(key=key, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    completions = generate_lists(model, params, prompts, **sampling, **how)
    return kl_of_samples(
        (model, ref_model or model), (params, ref_params), prompts, completions, **how
    )


def kl_of_samples(
    models: tuple[Model, Model],
    params: tuple[PyTree, PyTree],
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> dict[str, float]:
    """`kl_to_reference` of samples that are there already.

    Args:
      models, params: of the policy, and of the reference.
      prompts, completions: B token ids each, the completions drawn by the policy.
      temperature: that they were drawn at.
      batch_size: rows at once.

    Returns: as `kl_to_reference`.
    """
    batches = _teacher_forced(prompts, completions, batch_size)
    sums = (_kl_sums(*params, batch, temperature, models=models) for batch in batches)
    k1, k3, tokens = _totals(sums, 3)
    return {
        "kl_per_sequence": k1 / len(prompts),
        "kl_per_token": k1 / tokens,
        "kl_k3_per_sequence": k3 / len(prompts),
        "kl_k3_per_token": k3 / tokens,
        "kl_num_tokens": tokens,
    }


def _teacher_forced(prompts, completions, batch_size: int) -> Iterable[TokenBatch]:
    """Prompt + completion rows as TokenBatches of one shape; NumPy, all rows."""
    examples = [
        data.Example(
            np.asarray([*prompt, *completion], np.int32),
            np.arange(len(prompt) + len(completion)) >= len(prompt),
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    longest = max(len(example.tokens) for example in examples)
    length = data.bucket_length(longest, _NO_LIMIT)
    empty = data.Example(np.zeros(0, np.int32), np.zeros(0, bool))
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        yield data.collate_tokens(part + [empty] * (batch_size - len(part)), length)


@partial(sharding.announced, words=_words("the KL's pass", 2), static_argnames="models")
def _kl_sums(params, ref_params, batch: TokenBatch, temperature, *, models):
    # Every process has all rows here, so they are cut over the mesh inside.
    batch = jax.tree.map(
        lambda x: sharding.constrain(x, models[0].mesh, "batch", None), batch
    )
    logps, ref_logps = (
        forward.token_logps(model, p, batch, temperature=temperature)
        for model, p in zip(models, (params, ref_params), strict=True)
    )
    mask = batch.completion_mask
    k1, count = losses.token_mean(losses.kl_k1(logps, ref_logps), mask)
    k3, _ = losses.token_mean(losses.kl_k3(logps, ref_logps), mask)
    return jnp.stack([k1, k3, count])


def mean_reward(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward_fn: RewardFn,
    *,
    key: jax.Array,
    max_new_tokens: int,
    **sampling: Any,
) -> dict[str, Any]:
    """Samples a completion for each prompt and has it judged.

    Args:
      model, params, tokenizer, prompts, key, max_new_tokens: as in `sample_texts`.
      reward_fn: (prompts, completions, rows) -> float32 [B]; rows are the data rows,
        or {} where a prompt came without one.
      **sampling: stop_tokens, temperature, top_k, top_p, batch_size, likewise.

    Returns: `mean`, `std` and `stderr` of the rewards, `rewards` float32 [B], and
      `completions`, the texts.
    """
    how: dict[str, Any] = dict(key=key, max_new_tokens=max_new_tokens, **sampling)
    samples = sample_completions(model, params, tokenizer, prompts, **how)
    rewards = np.asarray(reward_of(reward_fn, samples), np.float32)
    return {
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "stderr": float(rewards.std() / np.sqrt(len(rewards))),
        "rewards": rewards,
        "completions": samples.completions,
    }


def _totals(sums: Iterable[jax.Array], number: int) -> list[float]:
    """So many sums of all batches, added in float64."""
    found = (sharding.gather(x).astype(np.float64) for x in sums)
    return sum(found, np.zeros(number)).tolist()
