"""The models of an online run, and the functions of them that a rollout asks for."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jalign import data, forward, generate, rewards, sharding
from jalign.models import Model, add_scalar_head, add_value_head, lora
from jalign.pretrained import Opened, load_pretrained, open_pretrained
from jalign.train.inputs import reward_inputs
from jalign.train.online_config import OnlineConfig, PPOConfig
from jalign.train.rollout import GOLD, RolloutFunctions, in_groups
from jalign.train.shapes import Shapes, in_pieces, longest_shapes
from jalign.train.trained import Trained, loading, part
from jalign.types import PyTree


class OnlineModels(NamedTuple):
    """The models and rewards of a run, before its first update.

    Attributes:
      models: "policy", a causal language model, perhaps with a value head; and, where
        the algorithm has one of its own, "critic", a model with a scalar head.
      params: what each starts from.
      parts: what is trained of them, and what stands beside it.
      tokenizer: the policy's.
      reward: (prompts, completions, rows) -> float32 [B] or [B, K]; NaN: not judged.
      reward_weights: name -> weight of each of the K rewards, in their order.
      inputs: digests of what is behind the rewards (inputs.py).
      gold: what judges held-out completions beside the reward; None without.
      gold_digest: of what is behind it.
      reference: what the policy starts from, frozen; None where none is asked for.
    """

    models: dict[str, Model]
    params: dict[str, PyTree]
    parts: dict[str, Trained]
    tokenizer: Any
    reward: rewards.RewardFn
    reward_weights: Mapping[str, float] = {"reward": 1.0}
    inputs: Mapping[str, str] = {}
    gold: rewards.RewardFn | None = None
    gold_digest: str = ""
    reference: PyTree = None


def load_models(
    config: OnlineConfig, mesh: Mesh | None, opened: Opened | None = None
) -> OnlineModels:
    """Loads the policy and the rewards: Python functions, verifiers, checkpoints.

    PPO's critic starts from the first reward model of the policy's vocabulary, be it a
    member of an ensemble, else from the policy with a new scalar head. With
    shared_trunk it is a new head of the policy.

    Args:
      opened: the policy's checkpoint, where it is open already.
    """
    compute = config.compute
    how = {"mesh": mesh, "dtype": compute.dtype, "remat": compute.remat}
    terms = rewards.parse_rewards(config.reward)
    seconds = config.options.reward_timeout
    loaded = rewards.load_terms(terms, timeout=seconds, wrap=on_main_process, **how)
    opened = opened or open_pretrained(config.model, config.base, head="language")
    given = how | loading(config, opened)
    policy, params, tokenizer = load_pretrained(opened, **given)
    gold, gold_digest = load_gold(config, timeout=seconds, **how)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    found, source = {"policy": (policy, params)}, {"policy": opened}
    if isinstance(config, PPOConfig):
        if config.ppo.critic.shared_trunk:
            found["policy"] = add_value_head(policy, params, key=key)
        else:
            alike = (
                # Its adapters, if it has some, are no start for the critic's own.
                (reward_model.model, lora.merge(reward_model.params))
                for reward_model in loaded.reward_models
                if reward_model
                and reward_model.tokenizer.get_vocab() == tokenizer.get_vocab()
            )
            known = next(alike, None)
            found["critic"] = known or add_scalar_head(policy, params, key=key)
            source["critic"] = opened._replace(lora=None) if known else opened
    return OnlineModels(
        {name: model for name, (model, _) in found.items()},
        {name: params for name, (_, params) in found.items()},
        {
            name: part(config, *given, source[name], number=number)
            for number, (name, given) in enumerate(found.items())
        },
        tokenizer,
        loaded.function,
        loaded.weights,
        reward_inputs(terms, loaded.reward_models),
        gold,
        gold_digest,
        reference_params(policy, params) if config.has_reference else None,
    )


def reference_params(policy: Model, params: PyTree) -> PyTree:
    """The parameters, frozen, in the dtype of the policy's products.

    Products cast their kernels to it anyway, so no log-probability changes by a bit;
    what they do not cast, the norms' scales, stays float32.
    """
    return jax.jit(policy.replace(unroll=False).for_decoding)(params)


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

    return gold, json.dumps(reward_inputs(terms, loaded.reward_models), sort_keys=True)


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


def make_functions(
    models: OnlineModels,
    config: OnlineConfig,
    shapes: Shapes | None = None,
    *,
    group_size: int = 1,
    held_out: int = 0,
) -> RolloutFunctions:
    """The compiled functions of a run, from host arrays to host arrays.

    Args:
      models: the run's.
      config: the run's; it says whether there is a reference.
      shapes: of the run; None takes the longest that the config lets in.
      group_size: completions of each prompt.
      held_out: number of prompts, where they are for held-out ones: eval_reward then
        judges them, too, with weight 0: it is read, and not followed.
    """
    shapes = shapes or longest_shapes(config)
    sampling, policy = config.options.sampling, models.models["policy"]
    critic = models.models.get("critic")
    rows = config.completions // config.options.num_minibatches
    stops = stop_tokens(models, sampling.stop_token_ids)
    reference = models.reference if config.has_reference else None
    temperature, parts = sampling.temperature, models.parts

    def sample(params, prompts, key):
        params = parts["policy"].whole(params)
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
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop_tokens=stops,
        )
        return generate.to_host(completion)

    def score(params, batch, with_logps):
        passes, how = {}, {"temperature": temperature}
        params = {name: parts[name].whole(tree) for name, tree in params.items()}
        if with_logps:
            passes["policy"] = lambda b: _policy(policy, params["policy"], b, **how)
        if reference is not None:
            passes["reference"] = lambda b: _reference(policy, reference, b, **how)
        if "critic" in params:
            passes["critic"] = lambda b: _critic(critic, params["critic"], b)
        if not passes:
            return {}

        def on_piece(piece):
            return {name: function(piece) for name, function in passes.items()}

        return in_pieces(on_piece, batch, rows=rows, mesh=policy.mesh)

    reward, weights = models.reward, models.reward_weights
    if held_out and models.gold is not None:
        reward = rewards.each_reward([reward, models.gold])
        weights = {**weights, GOLD: 0.0}
    return RolloutFunctions(
        sample=sample,
        score=score,
        reward=reward,
        tokenizer=models.tokenizer,
        stop_tokens=stops,
        row_lengths=shapes.row_lengths,
        reward_weights=weights,
        group_size=group_size,
    )


# At module level, so that a second run in one process compiles nothing anew.
def _pass(function: Callable[..., Any], whose: str) -> Callable[..., Any]:
    def words(model, params, batch, **_):
        return sharding.batch_words(f"the {whose} pass", batch)

    static = "temperature" if function is not forward.token_values else None
    return sharding.announced(function, words, static_argnums=0, static_argnames=static)


_reference = _pass(forward.token_logps, "reference's")
_policy = _pass(forward.policy_pass, "policy's")
_critic = _pass(forward.token_values, "critic's")


def stop_tokens(models: OnlineModels, chosen: Sequence[int] = ()) -> tuple[int, ...]:
    """What ends a completion: the user's ids, else every end-of-text that is known.

    Raises: ValueError for an id outside the vocabulary.
    """
    config = models.models["policy"].config
    stops = chosen or data.stop_tokens(models.tokenizer, config.eos_token_ids)
    size = config.vocab_size
    for stop in stops:
        if not 0 <= stop < size:
            raise ValueError(f"stop_token_ids: {stop} is not in 0 .. {size - 1}")
    return tuple(stops)
