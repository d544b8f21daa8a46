"""A model is its config and how to run it; the parameters are a dict beside it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models.attention import IMPLEMENTATIONS
from jalign.models.cache import KVCache, init_cache, place_cache
from jalign.models.config import ModelConfig
from jalign.models.decoder import Decoder, unstack_layers
from jalign.models.decoding import cast_for_decoding, decoding_bytes
from jalign.models.experts import Routing, routing_of
from jalign.models.how import How
from jalign.models.layers import Head, init_score_head
from jalign.models.platform import Platform, platform_of

Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Pure functions of (params, arrays); hashable, so it may be closed over or static.

    Attributes:
      config: ModelConfig.
      mesh: of sharding.make_mesh, for constraints on activations; None on one device.
      dtype: of activations, matmul inputs and the cache; parameters keep their own.
      remat: recompute blocks in the backward pass, to store one [B, T, D] a layer.
        Without it the platform says what is stored.
      attention: "auto", "plain", "blocked", "cudnn" or "splash", see `attend`. Only
        "plain" has forward mode (jax.jvp), on every platform.
      unroll: compile every layer by itself: slower to compile, faster to run where
        copies cost (no slices of stacked arrays). None: as the platform says.
      value_head: a language model has a scalar head too: a policy and its critic.
      platform: a row of models.platform; None is that of the mesh's devices. PLAIN is
        the definition, has forward mode, and knows no "auto" but "plain".
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"
    unroll: bool | None = None
    value_head: bool = False
    platform: Platform | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention={self.attention!r} is not one of {sorted(IMPLEMENTATIONS)}"
            )

    @property
    def runs_on(self) -> Platform:
        """What is best where this model runs."""
        row = platform_of(self.mesh) if self.platform is None else self.platform
        plain = self.attention == "plain"  # throughout, for forward mode
        forward_mode: dict[str, Any] = {"einsum": jnp.einsum, "reduced_in_one": None}
        forward_mode["merge_adapters"] = False
        return row._replace(**forward_mode) if plain else row

    @property
    def unrolled(self) -> bool:
        """Whether `apply` with a cache runs layer by layer instead of scanning."""
        return self._unrolls(self.runs_on.unroll_decoding)

    def _unrolls(self, up_to: int) -> bool:
        return self.config.num_layers <= up_to if self.unroll is None else self.unroll

    def _init(self, key: jax.Array) -> Params:
        # On a mesh-free twin: two tokens do not divide over devices.
        decoder = Decoder(How(self.config))
        zeros = jnp.zeros((1, 2), jnp.int32)
        params = dict(decoder.init(key, zeros, zeros, None, None)["params"])
        if self.has_scalar_head:
            head_key = jax.random.fold_in(key, 1)
            params["score"] = init_score_head(head_key, self.config.head_width)
        return params

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters, on the mesh where there is one.

        Args:
          key: typed PRNG key.

        Returns: nested dict, layers stacked on axis 0; matrices normal with standard
          deviation 0.02, norms 1, biases 0. Equal on every mesh.
        """
        options, shardings, effort = None, None, self.runs_on.init_effort
        # Inside of another jit the outer one's options hold.
        if effort is not None and not isinstance(key, jax.core.Tracer):
            options = {"xla_backend_optimization_level": effort}
        if self.mesh is not None:
            shardings = sharding.param_shardings(self.mesh, self.param_shapes())
        init = jax.jit(self._init, out_shardings=shardings, compiler_options=options)
        return init(key)

    def param_shapes(self) -> Params:
        """The tree of jax.ShapeDtypeStruct of `init`; allocates nothing."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        routing: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the decoder.

        Args:
          params: as of `init` or `load`.
          tokens: int32 [B, T]. An id outside the vocabulary gives NaN.
          positions: int32 [B, T], from 0 in each segment; 0..T-1 when None.
          segment_ids: int32 [B, T]; tokens see the earlier tokens of their own
            segment. None: every row is one document. With a cache it only tells
            padding (0), whose keys are never seen.
          cache: of `init_cache`; keys and values go into its next slots, and a query
            at position p sees all slots of positions <= p.
          routing: int [B, T, L, k], the experts of each token, of a mixture of them;
            None lets the routers say.

        Returns: hidden [B, T, D] after the final norm in the model's dtype, and the
          new cache (None without one).
        """
        call = self._call(params, tokens, positions, segment_ids, cache, routing)
        return call[0].apply(*call[1:])

    def apply_routed(
        self, params: Params, tokens: jax.Array, **where: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        """`apply` of a mixture of experts, without a cache: hidden states, and where
        the tokens went."""
        names = "positions", "segment_ids", "cache", "routing"
        decoder, *call = self._call(params, tokens, *map(where.get, names))
        (hidden, _), noted = decoder.apply(*call, mutable="routing")
        return hidden, routing_of(noted["routing"], self.config.num_layers)

    def _call(self, params, tokens, positions, segment_ids, cache, routing) -> Any:
        """The decoder, and what its `apply` takes."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens of shape {tokens.shape} are not [batch, time]")
        if positions is None:
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(steps, tokens.shape)
        unroll, stacked = self.unrolled, "layers" in params
        if cache is None and stacked:
            unroll = self._unrolls(self.runs_on.unroll_training)
        if unroll and stacked:
            params = unstack_layers(params, self.config.num_layers)
        how = How(self.config, self.mesh, self.dtype, self.attention, self.runs_on)
        decoder = Decoder(how, self.remat, unroll)
        given = tokens, positions, segment_ids, cache, routing
        return decoder, {"params": params}, *given

    def head(self, params: Params) -> Head:
        """What turns hidden states into logits; `unembed` is only a part of it."""
        c, unembed = self.config, self.unembed(params)
        if c.logit_scale != 1:
            unembed = unembed * jnp.asarray(c.logit_scale, unembed.dtype)
        if c.head_bias:
            bias = params["unembed"]["bias"][None].astype(unembed.dtype)
            unembed = jnp.concatenate([unembed, bias])
        return Head(unembed, c.final_softcap)

    def logits(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """All logits, float32 [B, T, V], scaled and capped as the family has it.

        To look at, not to train with: for that they are too many, see
        `losses.token_logps`. Arguments as of `apply`.
        """
        hidden, _ = self.apply(
            params, tokens, positions=positions, segment_ids=segment_ids
        )
        return self.head(params).logits(hidden)

    def unembed(self, params: Params) -> jax.Array:
        """The matrix [D, V] from hidden states to logits, in the parameters' dtype."""
        if self.config.num_labels:
            raise ValueError("this model has a scalar head: it gives no logits")
        if self.config.tie_embeddings:
            return params["embed"]["embedding"].T
        return params["unembed"]["kernel"]

    @property
    def has_scalar_head(self) -> bool:
        """Whether `score` works: a reward model, a critic, a policy with value_head."""
        return bool(self.config.num_labels) or self.value_head

    def score(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Reward or value of each position: [B, T, D] -> float32 [B, T]."""
        if not self.has_scalar_head:
            raise ValueError("this is a language model: it has no scalar head")
        kernel = params["score"]["kernel"].astype(jnp.float32)
        return jnp.einsum("btd,do->bto", hidden.astype(jnp.float32), kernel)[..., 0]

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        cache = init_cache(
            self.config, batch, length, self.dtype, unrolled=self.unrolled
        )
        return place_cache(cache, self.mesh)

    def for_decoding(self, params: Params) -> Params:
        """The parameters as a decode loop wants them: cast and cut once, not each step.

        `apply` and `unembed` take them as they take `params`; they are for reading.
        """
        params = cast_for_decoding(params, self.dtype)
        if self.unrolled:
            params = unstack_layers(params, self.config.num_layers)
        return params

    def on_decoding_mesh(
        self,
        params: Params,
        batch: int,
        length: int,
        device_bytes: float | None = None,
    ) -> tuple["Model", Callable[[Params], Params]]:
        """The same model on the mesh to decode on, see sharding.decoding_mesh.

        Args:
          params: of the model, or their shapes.
          batch, length: rows and slots of the cache.
          device_bytes: memory of a device; None asks this process's own.

        Returns: the model, and the jitted function that casts parameters and lays them
          out anew for it. On one device: this model, and parameters as they are.
        """
        if self.mesh is None or self.mesh.size == 1:
            return self, lambda params: params
        if device_bytes is None:
            device_bytes = sharding.device_bytes(self.mesh)
        found = sharding.decoding_mesh(
            self.mesh,
            lambda mesh: sum(decoding_bytes(self, mesh, params, batch, length)),
            device_bytes,
        )
        return self.replace(mesh=found), _moved(self, found)

    def with_scalar_head(self) -> "Model":
        """The same decoder with one output instead of a vocabulary."""
        config = dataclasses.replace(self.config, num_labels=1)
        return self.replace(config=config, value_head=False)

    def replace(self, **changes: Any) -> "Model":
        """A copy with other fields, as `model.replace(remat=True)`."""
        return dataclasses.replace(self, **changes)


@lru_cache(maxsize=16)
def _moved(model: Model, mesh: Mesh) -> Callable[[Params], Params]:
    """The function that lays out parameters of a model on another mesh."""

    def move(params):
        params = cast_for_decoding(params, model.dtype)
        return sharding.relay(params, model.mesh, mesh)

    return jax.jit(move)
