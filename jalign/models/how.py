"""What all modules of a decoder share: how they compute, and where the tokens are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models.config import ModelConfig
from jalign.models.layers import LayerNorm, Projection, RMSNorm
from jalign.models.platform import PLAIN, Platform
from jalign.models.positions import Rotation, alibi_slopes
from jalign.models.scores import Scores


class How(NamedTuple):
    """How all modules of a decoder compute.

    Attributes:
      config: the sizes.
      mesh: for sharding constraints and kernels; None on one device.
      dtype: of activations and matmul inputs.
      attention: an implementation of attention.attend.
      platform: what is best where it runs.
      one: float32 [], 1, in a loop over layers; see `of_layer`.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    attention: str = "plain"
    platform: Platform = PLAIN
    one: jax.Array | None = None

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        return sharding.constrain(x, self.mesh, *logical_axes)

    def of_layer(self, number: Any) -> "How":
        """In a loop over layers, where the platform casts kernels layer by layer.

        The compiler moves out of a loop what depends on all layers' kernels and not on
        the layer. Times a 1 that follows from the layer's number, it stays.
        """
        if not self.platform.casts_in_loop:
            return self
        return self._replace(one=(jnp.asarray(number) >= 0).astype(jnp.float32))

    def own(self, kernel: jax.Array) -> jax.Array:
        """The same kernel, of this layer alone."""
        return kernel if self.one is None else kernel * self.one

    def norm(self, name: str) -> RMSNorm | LayerNorm:
        c = self.config
        if c.norm == "layer":
            return LayerNorm(c.norm_eps, self.dtype, c.norm_bias, name=name)
        return RMSNorm(c.norm_eps, self.dtype, c.norm_offset, name=name)

    @property
    def scores(self) -> Scores:
        c = self.config
        alibi = tuple(alibi_slopes(c).tolist()) if c.positions == "alibi" else ()
        return Scores(c.query_scale, c.attention_softcap, alibi, c.alibi_rounded)

    def projection(
        self,
        name: str,
        equation: str,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None = None,
    ) -> Projection:
        how = self.dtype, self.platform, self.mesh, self.own
        return Projection(equation, shape, bias_shape, *how, name=name)


class Where(NamedTuple):
    """What all layers share about the tokens at hand; [B, T] each.

    Attributes:
      positions: int32.
      segment_ids: int32, or None when every row is one document.
      rotations: of layers.rope_tables.
      kv_positions: int32 [B, S], of the keys: the cache's slots, or the tokens.
      slot: int32 [], the first cache slot to write to.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    rotations: dict[str, Rotation]
    kv_positions: jax.Array
    slot: jax.Array


class Layer(NamedTuple):
    """What differs from layer to layer, beside the parameters.

    Attributes:
      number: int or int32 [], in the memory.
      kind: int or int32 [], which of config.kinds it is.
      routing: int [B, T, k], the experts that tokens go to; None lets the router say.
    """

    number: Any
    kind: Any
    routing: jax.Array | None = None


Memory = tuple[jax.Array, jax.Array]  # keys and values of all layers, see kv.KVCache
