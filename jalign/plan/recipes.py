"""What each recipe trains, and its real step: a row a recipe, and the only such place.

All else that a plan asks for stands in the run's own config.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jalign import generate, sharding, train
from jalign.models import Model
from jalign.models.lora import LoraConfig
from jalign.models.quantized import quantize_params
from jalign.models.tensors import is_narrow
from jalign.train.online_config import OnlineConfig
from jalign.train.trained import adapters_of, parts_of
from jalign.types import PreferenceBatch, PyTree, Rollout, TokenBatch

Array = Callable[..., Any]
"""(rows, columns..., dtype=float32) -> an array that is not there."""


class Recipe(NamedTuple):
    """How a plan sees a training command.

    Attributes:
      config: its config class.
      models: (config, language model) -> name in the table -> what is trained; first
        the model of the update that is planned.
      objective: (config, that model) -> its Objective.
      batch: (config, Array, rows) -> the batch of an update.
      sides: rows of the model for each of these: 2 for pairs.
    """

    config: type[train.RunConfig]
    models: Callable[[Any, Model], dict[str, Model]]
    objective: Callable[[Any, Model], Callable[..., Any]]
    batch: Callable[[Any, Array, int], PyTree]
    sides: int = 1


def _sft_objective(config: train.SFTConfig, model: Model):
    return train.make_sft_objective(model, terms=config.sft.terms())


def _scored(_: Any, model: Model) -> dict[str, Model]:
    return {"": model if model.config.num_labels else model.with_scalar_head()}


def _reward_objective(config: train.RewardConfig, model: Model):
    options = config.reward
    terms, center = options.terms(), options.center_coef
    return train.make_reward_objective(model, terms=terms, center_coef=center)


def _dpo_objective(config: train.DPOConfig, model: Model):
    terms, beta = config.dpo.terms(), config.dpo.reward_beta
    return train.make_dpo_objective(model, terms=terms, beta=beta)


def _policy_and_critic(config: train.PPOConfig, model: Model) -> dict[str, Model]:
    if config.ppo.critic.shared_trunk:
        return {"policy ": model.replace(value_head=True)}
    return {"policy ": model, "critic ": model.with_scalar_head()}


def _ppo_objective(config: train.PPOConfig, model: Model):
    options = config.ppo
    return train.make_ppo_objective(
        model,
        clip_eps=options.clip_eps,
        entropy_coef=options.entropy_coef,
        temperature=options.sampling.temperature,
        value_clip_eps=options.critic.value_clip_eps,
    )


def _grpo_objective(config: train.GRPOConfig, model: Model):
    options = config.grpo
    return train.make_grpo_objective(
        model,
        terms=options.terms(),
        reduction=options.reduction,
        beta=options.beta,
        entropy_coef=options.entropy_coef,
        temperature=options.sampling.temperature,
    )


def _tokens(config: train.RunConfig, array: Array, *rows: int) -> TokenBatch:
    size = (*rows, config.max_length)
    ids = array(*size, dtype=jnp.int32)
    return TokenBatch(ids, array(*size, dtype=jnp.bool_), ids, ids)


def _pairs(config: train.RunConfig, array: Array, rows: int) -> PreferenceBatch:
    per_pair = array(rows, 1)
    tokens = _tokens(config, array, rows, 2)
    return PreferenceBatch(tokens, per_pair, per_pair, per_pair)


def _rollout(config: OnlineConfig, array: Array, rows: int) -> Rollout:
    logps, critic = array(rows, config.max_length), isinstance(config, train.PPOConfig)
    several = critic or config.options.updates_per_rollout > 1
    return Rollout(
        *_tokens(config, array, rows),
        old_logps=logps if several else None,
        ref_logps=logps if config.has_reference else None,
        values=logps if critic else None,
        advantages=logps,
        returns=logps if critic else None,
        sampler_logps=None if critic else logps,
    )


def _one(name: str) -> Callable[[Any, Model], dict[str, Model]]:
    return lambda _, model: {name: model}


RECIPES: Mapping[str, Recipe] = {
    "sft": Recipe(train.SFTConfig, _one(""), _sft_objective, _tokens),
    "reward": Recipe(train.RewardConfig, _scored, _reward_objective, _pairs, 2),
    "dpo": Recipe(train.DPOConfig, _one(""), _dpo_objective, _pairs, 2),
    "ppo": Recipe(train.PPOConfig, _policy_and_critic, _ppo_objective, _rollout),
    "grpo": Recipe(train.GRPOConfig, _one("policy "), _grpo_objective, _rollout),
}


def name_of(config: train.RunConfig) -> str:
    """The training command of a config."""
    return next(k for k, recipe in RECIPES.items() if isinstance(config, recipe.config))


def update_rows(config: train.RunConfig) -> int:
    """Rows (pairs) of an update's batch, over all devices."""
    if isinstance(config, OnlineConfig):
        return config.completions // config.options.num_minibatches
    return config.batch_size


def trained(config: train.RunConfig, model_config, mesh) -> dict[str, Model]:
    """The models that a run updates, as Recipe.models."""
    dtype, remat = jnp.dtype(config.compute.dtype), config.compute.remat
    model = Model(model_config, mesh=mesh, dtype=dtype, remat=remat)
    return RECIPES[name_of(config)].models(config, model)


def shapes_of(
    config: train.RunConfig, model: Model, *, packed: bool = True
) -> tuple[PyTree, PyTree]:
    """Shapes of what a run trains of a model, and of the rest ({} without adapters),
    which may be quantized; with packed=False as if it were not."""
    quantize = config.lora.quantize if packed else None
    return _shapes(model, adapters_of(config, None), quantize)


def whole_shapes(model: Model) -> PyTree:
    """Of all parameters, which no way of computing changes."""
    return _param_shapes(model.replace(remat=False, dtype=jnp.dtype("float32")))


@functools.lru_cache(maxsize=8)
def _param_shapes(model: Model) -> PyTree:
    return model.param_shapes()


@functools.lru_cache(maxsize=16)
def _shapes(model: Model, adapters: LoraConfig | None, quantize: str | None):
    whole = whole_shapes(model)
    if adapters is None:
        return whole, {}

    def narrow(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x.astype(model.dtype) if is_narrow(name) else x

    def parts(params, key):
        params = jax.tree_util.tree_map_with_path(narrow, params)
        if quantize:
            params = quantize_params(params, quantize)
        return parts_of(model, params, adapters, key)

    return jax.eval_shape(parts, whole, jax.random.key(0))


def optimizer(config: train.OptimConfig) -> optax.GradientTransformation:
    """A run's optimizer; the length of its schedule changes no size."""
    return train.make_optimizer(config, config.warmup_steps + 1)[0]


def compiled_step(config: train.RunConfig, model_config, mesh) -> Any:
    """The training step of a run, compiled: a jax.stages.Compiled.

    Args:
      mesh: of real devices, or of sharding.topology_devices.
    """
    model = next(iter(trained(config, model_config, mesh).values()))
    recipe, tx = RECIPES[name_of(config)], optimizer(config.optim)
    shapes, frozen = shapes_of(config, model)
    state = train.abstract_state(shapes, tx, mesh=mesh)
    step = train.make_train_step(
        train.with_router_loss(
            recipe.objective(config, model), model, config.router_aux_coef
        ),
        tx,
        microbatches=config.compute.microbatches,
        state_shardings=sharding.state_shardings(mesh, state),
        dropout=config.lora.lora_dropout,
    )
    place = sharding.batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    batch = recipe.batch(config, array, update_rows(config))
    given = (state, batch, _placed(mesh, frozen)) if frozen else (state, batch)
    return step.lower(*given).compile()  # type: ignore


def compiled_sampling(
    config: OnlineConfig, model_config, mesh, device_bytes: float | None = None
) -> dict[str, Any]:
    """The programs of a rollout's sampling, compiled.

    Args:
      mesh: of real devices, or of sharding.topology_devices.
      device_bytes: memory of a device; None asks those that are here.

    Returns: "layout", which lays the parameters out to decode (on a mesh), and
      "sampling" -> jax.stages.Compiled.
    """
    model = next(iter(trained(config, model_config, mesh).values()))
    shapes, frozen = shapes_of(config, model)
    params, rows = _placed(mesh, frozen or shapes), config.completions
    decoder, laid_out = model.on_decoding_mesh(
        params, rows, config.max_length, device_bytes
    )
    programs = {}
    if decoder.mesh is not None and decoder.mesh.size > 1:
        programs["layout"] = jax.jit(laid_out).lower(params).compile()
        params = _placed(decoder.mesh, jax.eval_shape(laid_out, params))
    sampling = config.options.sampling
    programs["sampling"] = generate.lower(
        decoder,
        params,
        prompts=rows // config.group_size,
        group_size=config.group_size,
        longest=config.max_length - sampling.max_new_tokens,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    ).compile()
    return programs


def _placed(mesh, shapes: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        shapes,
        sharding.param_shardings(mesh, shapes),
    )
