"""Heads put on a model, and taken off: critics and reward models."""

import jax
import numpy as np

from jalign import sharding
from jalign.models.layers import init_score_head
from jalign.models.model import Model, Params


def add_scalar_head(
    model: Model, params: Params, *, key: jax.Array
) -> tuple[Model, Params]:
    """A reward model or critic that starts from a language model.

    Args:
      model, params: a language model (or a model with a head, which is replaced).
      key: typed PRNG key for the new head, normal with variance 1 / (D + 1).

    Returns: the model with num_labels=1, and parameters that share all arrays with
      `params` but have "score" instead of "unembed".
    """
    model = model.with_scalar_head()
    params = {k: v for k, v in params.items() if k != "unembed"}
    return model, params | {"score": _new_head(model, key)}


def add_value_head(
    model: Model, params: Params, *, key: jax.Array
) -> tuple[Model, Params]:
    """A language model with a critic on the same hidden states.

    Args:
      model, params: a language model.
      key: typed PRNG key for the new head, normal with variance 1 / (D + 1).

    Returns: the model with value_head=True, and parameters that share all arrays with
      `params` and have "score" beside them.
    """
    if model.config.num_labels:
        raise ValueError("this model has a scalar head already, and no vocabulary")
    model = model.replace(value_head=True)
    return model, params | {"score": _new_head(model, key)}


def split_heads(
    model: Model, params: Params
) -> tuple[tuple[Model, Params], tuple[Model, Params]]:
    """A model with value_head as two: (policy, its params), (critic, its params)."""
    if not model.value_head:
        raise ValueError("this model has no value head to split off")
    language = {k: v for k, v in params.items() if k != "score"}
    critic = {k: v for k, v in params.items() if k != "unembed"}
    policy = model.replace(value_head=False)
    return (policy, language), (model.with_scalar_head(), critic)


def _new_head(model: Model, key: jax.Array) -> Params:
    """The head's parameters, where the mesh wants them."""
    head = init_score_head(key, model.config.head_width)
    if model.mesh is not None:
        shardings = sharding.param_shardings(model.mesh, model.param_shapes())
        kernel, where = np.asarray(head["kernel"]), shardings["score"]["kernel"]
        # Works for a mesh over several processes, where device_put does not.
        pick = kernel.__getitem__
        head = {"kernel": jax.make_array_from_callback(kernel.shape, where, pick)}
    return head
