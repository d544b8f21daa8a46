"""Adapters for tests, of which no product is 0."""

from functools import partial

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jalign.models import Model, lora
from jalign.models.lora import LoraConfig


def random_adapters(model: Model, config: LoraConfig, seed: int = 0):
    """As after training: A, B and full copies are random NumPy arrays."""
    rng = np.random.default_rng(seed)
    init = partial(lora.init, model, config=config)
    tree = jax.eval_shape(init, params=model.param_shapes(), key=jax.random.key(0))
    shapes = flatten_dict(tree, sep="/")
    flat = {path: rng.normal(0, 0.3, x.shape) for path, x in shapes.items()}
    for row in lora.targeted(model, config).values():
        base = row.path.removesuffix("kernel")
        if base + lora.A not in flat:
            continue
        for layer in range(model.config.num_layers):
            rank, alpha = config.rank_and_alpha(row.module.format(layer))
            flat[base + lora.A][layer, ..., rank:] = 0
            flat[base + lora.B][layer, rank:] = 0
            flat[base + lora.SCALE][layer] = config.scale_of(rank, alpha)
    return unflatten_dict({k: x.astype(np.float32) for k, x in flat.items()}, sep="/")
