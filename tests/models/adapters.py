"""Adapters for tests, of which no product is 0."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jalign.models import Model, lora
from jalign.models.lora import LoraConfig
from tests.models.tiny import random_params


def random_adapters(model: Model, config: LoraConfig, seed: int = 0):
    """As after training: B is random where A is, and so are full copies."""
    rng = np.random.default_rng(seed)
    start = lora.init(model, random_params(model), config, jax.random.key(seed))
    flat = flatten_dict(start, sep="/")
    for path, x in flat.items():
        if path.endswith(lora.B):
            a = np.asarray(flat[path.removesuffix(lora.B) + lora.A])
            used = np.abs(a).sum(axis=tuple(range(1, a.ndim - 1))) > 0  # [L, r]
            used = used.reshape(*used.shape, *(1,) * (x.ndim - 2))
            flat[path] = jax.device_put(
                (used * rng.normal(0, 0.3, x.shape)).astype("f4"), x.sharding
            )
        elif not path.endswith((lora.A, lora.SCALE)):
            drawn = rng.normal(0.3, 0.3, x.shape).astype("f4")
            flat[path] = jax.numpy.asarray(drawn)
    return unflatten_dict(flat, sep="/")
