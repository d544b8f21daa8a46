"""The models of an online run as the functions that a rollout asks for."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jalign import data, forward, generate, models, rewards, sharding
from jalign.pretrained import Opened, load_pretrained
from jalign.train.inputs import reward_inputs
from jalign.train.online_config import OnlineConfig, SampleConfig
from jalign.train.rollout import Actors, in_groups
from jalign.train.shapes import Shapes, longest_shapes
from jalign.types import PyTree, TokenBatch

GOLD = "--eval-reward"  # no term of a --reward is called so


class Cast(NamedTuple):
    """Everybody in an online run. Parameters are those before the first update.

    Attributes:
      policy: a causal language model; its reference has the same parameters.
      policy_params: of the reference, and what the policy starts from.
      critic: a model with a scalar head; None where the algorithm has none, or the
        policy has a value head.
      critic_params: what the critic starts from.
      tokenizer: the policy's.
      reward: (prompts, completions, rows) -> float32 [B] or [B, K]; NaN: not judged.
      reward_weights: name -> weight of each of the K rewards, in their order.
      inputs: digests of what is behind the rewards (inputs.py).
      gold: what judges held-out completions beside the reward; None without.
      gold_digest: of what is behind it.
    """

    policy: models.Model
    policy_params: PyTree
    critic: Any
    critic_params: PyTree
    tokenizer: Any
    reward: rewards.RewardFn
    reward_weights: Mapping[str, float] = {"reward": 1.0}
    inputs: Mapping[str, str] = {}
    gold: rewards.RewardFn | None = None
    gold_digest: str = ""


def load_cast(
    config: OnlineConfig,
    mesh: Mesh | None,
    opened: Opened | None = None,
    *,
    with_critic: bool = True,
    value_head: bool = False,
) -> Cast:
    """Loads the policy and the rewards: Python functions, verifiers, checkpoints.

    The critic starts from the first reward model of the policy's vocabulary, be it a
    member of an ensemble, else from the policy with a new scalar head. With value_head
    it is a new head of the policy.

    Args:
      opened: the policy's checkpoint, where it is open already.
    """
    compute = config.compute
    how = {"mesh": mesh, "dtype": compute.dtype, "remat": compute.remat}
    terms = rewards.parse_rewards(config.reward)
    seconds = config.options.reward_timeout
    loaded = rewards.load_terms(terms, timeout=seconds, wrap=on_main_process, **how)
    policy, params, tokenizer = load_pretrained(
        opened or config.model, head="language", **how
    )
    gold, gold_digest = load_gold(config, timeout=seconds, **how)
    critic, critic_params = None, None
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    if value_head:
        policy, params = models.add_value_head(policy, params, key=key)
    elif with_critic:
        judges = (judge for judge in loaded.judges if judge)
        critic, critic_params = next(
            (
                (judge.model, judge.params)
                for judge in judges
                if judge.tokenizer.get_vocab() == tokenizer.get_vocab()
            ),
            None,
        ) or models.add_scalar_head(policy, params, key=key)
    return Cast(
        policy,
        params,
        critic,
        critic_params,
        tokenizer,
        loaded.function,
        loaded.weights,
        reward_inputs(terms, loaded.judges),
        gold,
        gold_digest,
    )


def load_gold(config: OnlineConfig, **how: Any) -> tuple[rewards.RewardFn | None, str]:
    """(what --eval-reward names, a digest of what is behind it); (None, "") without."""
    if config.eval_reward is None:
        return None, ""
    terms = rewards.parse_rewards(config.eval_reward)
    loaded = rewards.load_terms(terms, wrap=on_main_process, **how)
    weights = list(loaded.weights.values())

    def gold(prompts, completions, rows, *, samples=None):
        values = loaded.function(prompts, completions, rows, samples=samples)
        return rewards.add_up(values, weights)

    return gold, json.dumps(reward_inputs(terms, loaded.judges), sort_keys=True)


def with_gold(actors: Actors, gold: rewards.RewardFn | None) -> Actors:
    """The actors with one more reward, of weight 0: it is read, and not followed."""
    if gold is None:
        return actors
    return actors._replace(
        reward=rewards.each_reward([actors.reward, gold]),
        reward_weights={**actors.reward_weights, GOLD: 0.0},
    )


def on_main_process(reward: rewards.RewardFn) -> rewards.RewardFn:
    """The same rewards on every process, asked for once, on process 0.

    A function of the user's may be slow, cost money or draw random numbers.
    """
    if jax.process_count() == 1:
        return reward

    def shared(prompts, completions, rows, *, samples: rewards.Samples | None = None):
        values, fault = np.zeros(len(prompts), np.float32), None
        if sharding.is_main_process():
            try:
                given = {} if samples is None else {"samples": samples}
                values = reward(prompts, completions, rows, **given)
            except Exception as error:  # told to all, then raised here
                fault = error
        told = values, np.array(fault is not None)
        values, failed = multihost_utils.broadcast_one_to_all(told)
        if fault is not None:
            raise fault
        if failed:
            raise ValueError("reward: failed on process 0, see its message")
        return np.asarray(values)

    return shared


def make_actors(
    cast: Cast,
    config: OnlineConfig,
    shapes: Shapes | None = None,
    *,
    group_size: int = 1,
    held_out: int = 0,
) -> Actors:
    """The compiled functions of a run, from host arrays to host arrays.

    Args:
      cast: who plays; without a critic there is no critic's function.
      config: the run's; it says whether there is a reference.
      shapes: of the run; None takes the longest that the config lets in.
      group_size: completions of each prompt.
      held_out: number of prompts, where they are for held-out ones.
    """
    shapes = shapes or longest_shapes(config)
    sampling, policy, mesh = config.options.sampling, cast.policy, cast.policy.mesh
    rows = config.completions // config.options.num_minibatches
    stops = stop_tokens(cast, sampling)

    def sample(params, prompts, key):
        *shorter, length = shapes.prompt_lengths
        size, pad_to = group_size, (min(config.completions, held_out), length)
        if shorter and not held_out and max(map(len, prompts)) <= shorter[0]:
            pad_to = (1, shorter[0])
        elif shorter:
            # One shape for rollouts with a rare long prompt and for held-out ones: all
            # rows by themselves, which changes no draw.
            prompts, size = in_groups(prompts, group_size), 1
            pad_to = (config.completions, length)
        completion = generate.generate(
            policy,
            params,
            prompts,
            key=key,
            group_size=size,
            pad_to=pad_to,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop_tokens=stops,
        )
        return generate.to_host(completion)

    def on_host(function, model, **options) -> Callable[[PyTree, TokenBatch], Any]:
        return lambda params, batch: in_pieces(
            functools.partial(function, model, params, **options),
            batch,
            rows=rows,
            mesh=mesh,
        )

    temperature = sampling.temperature
    logps = on_host(_logps, policy, temperature=temperature)
    reference = functools.partial(logps, cast.policy_params)
    return Actors(
        sample=sample,
        policy=on_host(_logps_and_values, policy, temperature=temperature),
        reference=reference if config.has_reference else None,
        critic=on_host(_values, cast.critic) if cast.critic else None,
        reward=cast.reward,
        tokenizer=cast.tokenizer,
        stop_tokens=stops,
        row_lengths=shapes.row_lengths,
        reward_weights=cast.reward_weights,
        group_size=group_size,
    )


# At module level, so that a second run in one process compiles nothing anew.
def _pass(function: Callable[..., Any], whose: str) -> Callable[..., Any]:
    def words(model, params, batch, **_):
        return sharding.batch_words(f"the {whose} pass", batch)

    static = "temperature" if function is not forward.token_values else None
    return sharding.announced(function, words, static_argnums=0, static_argnames=static)


_logps = _pass(forward.token_logps, "reference's")
_logps_and_values = _pass(forward.logps_and_values, "policy's")
_values = _pass(forward.token_values, "critic's")


def stop_tokens(cast: Cast, sampling: SampleConfig) -> tuple[int, ...]:
    """What ends a completion: the user's ids, else every end-of-text that is known.

    Raises: ValueError for an id outside the vocabulary.
    """
    known = data.stop_tokens(cast.tokenizer, cast.policy.config.eos_token_ids)
    stops = sampling.stop_token_ids or known
    size = cast.policy.config.vocab_size
    for stop in stops:
        if not 0 <= stop < size:
            raise ValueError(f"stop_token_ids: {stop} is not in 0 .. {size - 1}")
    return tuple(stops)


def local_rows(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """A batch that every process holds whole -> global arrays over the mesh."""
    index, count = sharding.process_slice(mesh)

    def mine(x):
        share = len(x) // count
        return x[index * share : (index + 1) * share]

    return sharding.put_batch(jax.tree.map(mine, batch), mesh)


def in_pieces(
    function: Callable[[PyTree], PyTree], batch: PyTree, *, rows: int, mesh: Mesh | None
) -> PyTree:
    """function(batch), `rows` rows at a time: one compilation and bounded memory.

    Args:
      function: from a batch on the mesh to arrays [rows, ...].
      batch: host arrays [B, ...]; filled up with zeros to a multiple of `rows`.
      rows: of each piece.
      mesh: where the pieces go.

    Returns: host arrays [B, ...].
    """
    size = len(jax.tree.leaves(batch)[0])
    missing = -size % rows

    def fill(x):
        return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])

    filled = jax.tree.map(fill, batch)
    pieces = []
    for start in range(0, size, rows):
        piece = jax.tree.map(lambda x, at=start: x[at : at + rows], filled)
        pieces.append(sharding.gather(function(local_rows(piece, mesh))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:size], *pieces)
