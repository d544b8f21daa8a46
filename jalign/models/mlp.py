"""The part of a layer that sees one token at a time: an MLP, or experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jalign.models import experts
from jalign.models.how import How, Layer, Where

_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class MLP(nn.Module):
    """down(f(gate(x)) * up(x)), as SwiGLU (arXiv:2002.05202); or down(f(up(x))).

    Attributes:
      how: sizes and switches.
      width: F.
    """

    how: How
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, how = self.how.config, self.how
        act, D, F = _ACTIVATIONS[c.activation], c.hidden_size, self.width

        def wide(name: str) -> jax.Array:
            bias = (F,) if c.mlp_bias else None
            return how.projection(name, "btd,df->btf", (D, F), bias)(x)

        if c.gate_up_joined:
            both = how.projection("gate_up", "btd,dpf->btpf", (D, 2, F))(x)
            hidden = act(both[:, :, 0]) * both[:, :, 1]
        elif c.gated:
            hidden = act(wide("gate")) * wide("up")
        else:
            hidden = act(wide("up"))
        hidden = how.constrain(hidden, "batch", "time", "act_mlp")
        bias = (D,) if c.mlp_bias else None
        return how.projection("down", "btf,fd->btd", (F, D), bias)(hidden)


class MixtureMLP(nn.Module):
    """Experts in the place of an MLP, see models.experts; and the shared one.

    Notes in the collection "routing", where that is asked for, where tokens went.
    """

    how: How

    @nn.compact
    def __call__(self, x: jax.Array, where: Where, layer: Layer) -> jax.Array:
        c, how = self.how.config, self.how
        e, D = c.experts, c.hidden_size
        assert e is not None
        act = _ACTIVATIONS[c.activation]
        router = experts.Weight((D, e.count), name="router")()
        kernels = experts.Kernels(e.count, D, c.intermediate_size, name="experts")()
        kernels = tuple(map(how.own, kernels))
        ids, weights, p = experts.route(e, x, router, layer.routing)
        real = jnp.ones(x.shape[:2], bool)
        if where.segment_ids is not None:
            real = where.segment_ids != 0
        self.sow("routing", "ids", ids)
        self.sow("routing", "sums", experts.sums_of(ids, p, real))
        y = experts.on_mesh(how.mesh, act, x, ids, weights, kernels, how.dtype)
        if e.shared_size:
            gate = experts.Weight((D, 1), name="shared_gate")()
            share = jax.nn.sigmoid(x @ gate.astype(x.dtype))
            y = y + share * MLP(how, e.shared_size, name="shared")(x)
        return how.constrain(y, "batch", "time", "act_embed")
