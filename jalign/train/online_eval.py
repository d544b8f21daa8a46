"""What a policy does on held-out prompts, before and after an online run."""

from collections.abc import Sequence

import jax
import numpy as np

from jalign import data
from jalign.rewards import mean_of_judged
from jalign.train.actors import GOLD
from jalign.train.evaluations import Evaluation
from jalign.train.online_config import OnlineConfig
from jalign.train.rollout import Actors, reference_kl, sample_and_score
from jalign.types import PyTree

_EVAL_STREAM = 2**31 - 1  # no iteration gets as far, so no rollout uses its key
_SAMPLES = 8  # completions kept for the report


def evaluate_prompts(
    actors: Actors,
    params: PyTree,
    prompts: Sequence[data.PromptExample],
    config: OnlineConfig,
) -> Evaluation:
    """Samples one completion for each prompt, with the same draw every time.

    The figures are means over the prompts: reward, gold_reward where there is an
    eval_reward, each of several rewards, kl (to the reference where there is one, nats
    a completion), completion_length (tokens), stopped (share).

    Args:
      actors: of make_actors, with groups of one.
      params: the policy's.
      prompts: held-out ones; none gives no figures.
      config: for the seed and the batch size.
    """
    if not prompts:
        return Evaluation({}, [])
    key = jax.random.fold_in(jax.random.key(config.seed), _EVAL_STREAM)
    batch_size = config.completions  # as many rows as a rollout has
    parts = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        part = prompts[start : start + batch_size]
        part_key = jax.random.fold_in(key, number)
        with_logps = actors.reference is not None  # they are read for the KL alone
        parts.append(
            sample_and_score(actors, params, part, part_key, with_logps=with_logps)
        )

    def mean(of) -> float:
        return float(np.concatenate([of(part) for part in parts]).mean())

    figures = {"reward": mean(lambda x: x.rewards)}
    names = list(actors.reward_weights)
    if GOLD in names:
        names.remove(GOLD)
        figures["gold_reward"] = mean(lambda x: x.reward_parts[GOLD])
    if len(names) > 1:
        for name in names:
            column = np.concatenate([part.reward_parts[name] for part in parts])
            figures[f"rewards/{name}"] = mean_of_judged(column)
    if actors.reference:
        figures["kl"] = mean(reference_kl)
    figures |= {
        "completion_length": mean(lambda x: x.batch.completion_mask.sum(1)),
        "stopped": mean(lambda x: x.stopped),
    }
    return Evaluation(figures, parts[0].texts[:_SAMPLES])
