"""From (model, params, batch) to log-probabilities, rewards and values.

The seam between the model and the losses: tokens are shifted here and only here.
Everything is aligned to the token index: entry [b, t] belongs to tokens[b, t], is
computed from tokens[b, :t], and is 0 where completion_mask is False.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jalign import losses
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE
from jalign.losses.layout import ONE_DEVICE
from jalign.models import Model
from jalign.models.experts import Routing
from jalign.sharding.context import rows_to_time, time_to_rows
from jalign.sharding.groups import logits_groups
from jalign.types import PreferenceBatch, TokenBatch

PyTree = Any
FEWEST_TOKENS = 64  # that a chunk has, whatever the platform says of its bytes


class TokenStats(NamedTuple):
    """What a policy says of every trained token.

    Attributes:
      logps: float32 [B, T], nats.
      entropy: float32 [B, T], nats, of the distribution that tokens[b, t] came from.
      values: float32 [B, T], as `token_values`, of a policy with a value head.
    """

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None = None


def chunk_size(model: Model) -> int:
    """Tokens of the global batch whose logits exist at once: a fixed number a device.

    Vocabulary and rows are cut over the mesh, so the default serves each device; fewer
    where the platform wants no more bytes of logits than so.
    """
    tokens, at_once = DEFAULT_CHUNK_SIZE, model.runs_on.logits_bytes
    if at_once is not None:
        fit = max(1, at_once // (4 * model.config.vocab_size))
        tokens = min(tokens, max(FEWEST_TOKENS, 1 << fit.bit_length() - 1))
    return tokens * (model.mesh.size if model.mesh is not None else 1)


def logits_options(model: Model, hidden: jax.Array) -> dict[str, Any]:
    """chunk_size and layout of `losses.map_logits` for hidden of `rows_apart`."""
    sizes = *hidden.shape[:2], model.config.vocab_size
    layout = logits_groups(model.mesh, *sizes) or ONE_DEVICE
    return {"chunk_size": chunk_size(model), "layout": layout}


def hidden_states(model: Model, params: PyTree, batch) -> jax.Array:
    """[B, T, D] after the final norm, for a TokenBatch or a Rollout."""
    where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    if (kept := getattr(batch, "routing", None)) is not None:
        where["routing"] = kept
    noted = _NOTED.get()
    if noted is None or model.config.experts is None:
        return model.apply(params, batch.tokens, **where)[0]
    hidden, routing = model.apply_routed(params, batch.tokens, **where)
    noted.append(routing)
    return hidden


_NOTED: ContextVar[list[Routing] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noting_routes() -> Iterator[list[Routing]]:
    """Notes where the tokens of each pass go that is traced within, of mixtures of
    experts; to be read within the same trace."""
    token = _NOTED.set(noted := [])
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def token_stats(
    model: Model, params: PyTree, batch, *, temperature: float = 1.0
) -> TokenStats:
    """Log-probabilities, entropies and values of a TokenBatch's or Rollout's tokens."""
    hidden, mask = hidden_states(model, params, batch), batch.completion_mask
    logps, entropy = _score(
        model, params, hidden, batch, temperature, return_entropy=True
    )
    values = _values(model, params, hidden, batch) if model.value_head else None
    return TokenStats(_align(logps, mask), _align(entropy, mask), values)


def token_logps(
    model: Model, params: PyTree, batch, *, temperature: float = 1.0
) -> jax.Array:
    """log p(tokens[b, t] | tokens[b, :t]), float32 [B, T], without the entropies."""
    hidden = hidden_states(model, params, batch)
    logps = _score(model, params, hidden, batch, temperature)
    return _align(logps, batch.completion_mask)


class PolicyPass(NamedTuple):
    """What a rollout keeps of a policy: `token_logps`; `token_values` where it has a
    value head; and the experts of each token where it has a mixture of them."""

    logps: jax.Array
    values: jax.Array | None = None
    routing: jax.Array | None = None


def policy_pass(
    model: Model, params: PyTree, batch, *, temperature: float = 1.0
) -> PolicyPass:
    """All of a PolicyPass from one pass of the model."""
    with noting_routes() as noted:
        hidden = hidden_states(model, params, batch)
    logps = _score(model, params, hidden, batch, temperature)
    values = _values(model, params, hidden, batch) if model.value_head else None
    experts, routing = model.config.experts, None
    if experts is not None:
        narrow = jnp.uint8 if experts.count <= 256 else jnp.uint16
        routing = noted[0].ids.astype(narrow)
    return PolicyPass(_align(logps, batch.completion_mask), values, routing)


def _score(model: Model, params: PyTree, hidden, batch, temperature: float, **options):
    """`losses.token_logps` of each token's successor, where it is trained: [B, T]."""
    rows, head = rows_apart(model, (hidden, *successors(batch))), model.head(params)
    scores = losses.token_logps(
        head.inputs(rows[0]),
        head.unembed,
        rows[1],
        mask=rows[2],
        temperature=temperature,
        softcap=head.softcap,
        **logits_options(model, rows[0]),
        **options,
    )
    return rows_together(model, scores, batch.tokens.shape)


def successors(batch) -> tuple[jax.Array, jax.Array]:
    """What each hidden state predicts: (tokens, whether they are trained), [B, T].

    These are shifted, for the hidden states would have to be copied.
    """
    one_less = ((0, 0), (0, 1))
    return (
        jnp.pad(batch.tokens[:, 1:], one_less),
        jnp.pad(batch.completion_mask[:, 1:], one_less),
    )


def rows_apart(model: Model, arrays: PyTree) -> PyTree:
    """[B, T, ...] as rows of which each lies on one device, for what sees one token at
    a time: on a mesh as context.time_to_rows has it, on one device [1, B * T, ...].

    So the tokens that count in any of a device's rows are counted together: chunks of
    logits with none of them are left out.
    """
    if model.mesh is not None:
        return jax.tree.map(lambda x: time_to_rows(jnp.asarray(x), model.mesh), arrays)
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), arrays)


def rows_together(model: Model, arrays: PyTree, shape: tuple[int, ...]) -> PyTree:
    """The inverse of `rows_apart`, for arrays of one number a token; shape: (B, T)."""
    if model.mesh is not None:
        return jax.tree.map(lambda x: rows_to_time(x, model.mesh, shape[0]), arrays)
    return jax.tree.map(lambda x: x.reshape(shape), arrays)


def token_values(model: Model, params: PyTree, batch) -> jax.Array:
    """The critic's value of the state before each trained token, float32 [B, T]."""
    return _values(model, params, hidden_states(model, params, batch), batch)


def _values(model: Model, params: PyTree, hidden: jax.Array, batch) -> jax.Array:
    return _align(model.score(params, hidden), batch.completion_mask)


def pair_rewards(
    model: Model, params: PyTree, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """The reward model's score at each side's last token: chosen, rejected [B, P].

    float32; 0 where there is no pair.
    """
    rows = rows_of(batch)
    scores = model.score(params, hidden_states(model, params, rows))
    ids = rows.segment_ids
    last = ids != jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    return pair_sums(jnp.where(last, scores, 0.0), batch)


def pair_logps(
    model: Model, params: PyTree, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """Each completion's log-probability, summed: chosen, rejected, float32 [B, P]."""
    return pair_sums(token_logps(model, params, rows_of(batch)), batch)


def rows_of(batch: PreferenceBatch) -> TokenBatch:
    """All parts' rows as one TokenBatch [B * R, T]; none leaves its device."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.rows)


def pair_sums(x: jax.Array, batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """Sums over the tokens of each side of each pair.

    Args:
      x: [B * R, T], of the rows of `rows_of(batch)`.

    Returns: chosen, rejected, float32 [B, P]; 0 on filler.
    """
    parts, places = batch.margins.shape
    ids = jnp.reshape(batch.rows.segment_ids, (parts, 1, -1))
    of_segment = ids == jnp.arange(1, 2 * places + 1)[None, :, None]
    sums = jnp.sum(jnp.where(of_segment, x.reshape(parts, 1, -1), 0.0), axis=2)
    pairs = sums.reshape(parts, places, 2)
    return pairs[..., 0], pairs[..., 1]


def valid_pairs(batch: PreferenceBatch) -> jax.Array:
    """bool [B, P], False on filler."""
    here = jnp.asarray(rows_of(batch).segment_ids > 0, jnp.float32)
    return pair_sums(here, batch)[0] > 0


def make_reference_fn(
    model: Model,
) -> Callable[[PyTree, PreferenceBatch], tuple[jax.Array, jax.Array]]:
    """A jitted (params, PreferenceBatch) -> (chosen, rejected), float32 [B, P], nats.

    The log-probability of each completion, summed over its trained tokens. Give it the
    frozen reference's parameters once per batch, before training.
    """

    @jax.jit
    def reference_logps(params: PyTree, batch: PreferenceBatch):
        return pair_logps(model, params, batch)

    return reference_logps


def _align(x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T] of each token's successor -> [B, T] of each token, 0 outside the mask."""
    return jnp.where(mask, jnp.pad(x[:, :-1], ((0, 0), (1, 0))), 0.0)
