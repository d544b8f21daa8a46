"""What decoding holds of a model: parameters cast, and a cache, on a mesh."""

from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models.cache import AXES, init_cache

# Of leaves that are not cast to the products' dtype.
KEPT_AS_THEY_ARE = ("scale", "lora_scale", "nf4", "absmax", "nested_absmax")
KEPT_AS_THEY_ARE += ("nested_offset", "int8")


def cast_for_decoding(params: Any, dtype: DTypeLike) -> Any:
    """Kernels and embeddings in the dtype of products, once."""

    def cast(path, x):
        return x if path[-1].key in KEPT_AS_THEY_ARE else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def decoding_bytes(
    model: Any, mesh: Any, params: Any, batch: int, length: int
) -> tuple[int, int]:
    """What each device of a mesh holds to decode.

    Args:
      model: its config and dtype count, its own mesh does not.
      mesh: of make_mesh or abstract_mesh; None is one device.
      params: of the model, or their shapes.
      batch, length: rows and slots of the cache.

    Returns: bytes of the parameters, cast, and of the cache.
    Raises: ValueError where the mesh does not divide the parameters.
    """
    mesh = mesh or sharding.abstract_mesh(1)
    shapes = jax.eval_shape(partial(cast_for_decoding, dtype=model.dtype), params)
    weights = sharding.param_shardings(mesh, shapes)
    parts = sharding.batch_parts(mesh)
    rows = -(-batch // parts) * parts  # as the sampler fills them up
    new = partial(init_cache, model.config, rows, length, model.dtype)
    cache = jax.eval_shape(new)
    place = sharding.activation_sharding(mesh, cache.k.shape, *AXES)
    held = sharding.shard_bytes((cache.k, cache.v), (place, place))
    return sharding.shard_bytes(shapes, weights), held
