"""The estimate: exact bytes of states by eval_shape, formulas for the rest."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jalign import sharding
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE
from jalign.models import Model
from jalign.models.decoding import decoding_bytes
from jalign.plan.recipes import (
    RECIPES,
    name_of,
    optimizer,
    shapes_of,
    trained,
    update_rows,
    whole_shapes,
)
from jalign.plan.speed import Speed, roofline
from jalign.plan.text import table
from jalign.plan.work import Part, Work, work
from jalign.sharding import Machine
from jalign.sharding.context import length_multiple
from jalign.sharding.groups import logits_members
from jalign.train.config import OptimConfig, RunConfig
from jalign.train.online_config import OnlineConfig
from jalign.train.online_models import reference_params
from jalign.train.step import abstract_state
from jalign.types import PyTree, TrainState

USABLE = 0.92  # the rest goes to the runtime, to programs and to fragmentation


class Row(NamedTuple):
    """One line of the table: bytes on each device, and what they are."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """What an update takes of one device.

    Attributes:
      config: the run's.
      machine: where it runs.
      mesh: axis name -> size.
      num_parameters: of the trained policy (or reward model).
      resident: rows of what stays for the whole run.
      transient: phase -> rows of what lives within it; phases take turns.
      work: FLOPs and bytes that an update sends.
      speed: of an update, by arithmetic; None where the machine's is not known.
      compiled: the compiler's own rows for the training step, if asked for.
      compiled_sent: bytes that it sends, by kind of collective.
      compiled_speed: of the compiled step, for a TPU.
      compiled_rollout: the compiler's rows for sampling, beside what trains.
      advice: what to change; empty where it fits.
      command: that starts the run, where `find` chose it.
      found: what was best of those that `find` looked at, this one first.
    """

    config: RunConfig
    machine: Machine
    mesh: dict[str, int]
    num_parameters: int
    resident: tuple[Row, ...]
    transient: dict[str, tuple[Row, ...]]
    work: Work
    speed: Speed | None = None
    compiled: tuple[Row, ...] = ()
    compiled_sent: tuple[Part, ...] = ()
    compiled_speed: Speed | None = None
    compiled_rollout: tuple[Row, ...] = ()
    advice: str = ""
    command: str = ""
    found: "tuple[Plan, ...]" = ()

    @property
    def total(self) -> int:
        """Estimated peak in bytes on each device."""
        phases = (sum(row.bytes for row in rows) for rows in self.transient.values())
        return sum(row.bytes for row in self.resident) + max(phases, default=0)

    @property
    def peak(self) -> int:
        """Bytes to count on: the compiler's, which knows more, where it was asked.

        It sees one training step; PPO and GRPO keep other models beside it, so there
        the larger of both counts.
        """
        compiled = sum(row.bytes for row in self.compiled)
        return max(compiled, self.total if self._partly_compiled else 0)

    @property
    def _partly_compiled(self) -> bool:
        return not self.compiled or isinstance(self.config, OnlineConfig)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits into a device; None where its memory is unknown."""
        return None if self.usable is None else self.peak <= self.usable

    @property
    def usable(self) -> int | None:
        """Bytes that a run may count on; None where the memory is unknown."""
        size = self.machine.device_bytes
        return None if size is None else int(USABLE * size)

    def __str__(self) -> str:
        return table(self)


def estimate(config: RunConfig, model_config, mesh, machine: Machine) -> Plan:
    """The plan of a run on an abstract mesh.

    Raises: ValueError where the mesh does not divide the model or the batch.
    """
    models = trained(config, model_config, None)
    model = next(iter(models.values()))
    whole = whole_shapes(model)
    weights = _param_bytes(mesh, whole)
    resident: list[Row] = []
    digits = config.lora.quantize or config.compute.dtype
    for name, each in models.items():
        state, frozen = _state(each, config)
        places = sharding.state_shardings(mesh, state).opt_state
        moments = sharding.shard_bytes(state.opt_state, places)
        kept = _param_bytes(mesh, frozen)
        resident += [
            Row(f"{name}parameters", _param_bytes(mesh, state.params), "float32"),
            *([Row(f"{name}base", kept, f"{digits}, frozen")] if kept else []),
            Row(f"{name}optimizer state", moments, "float32"),
        ]
    transient = {"update": _update(config, model, mesh)}
    if isinstance(config, OnlineConfig):
        if config.has_reference and config.lora.lora() is None:
            held = functools.partial(reference_params, model)
            shapes = jax.eval_shape(held, whole)
            kept = _param_bytes(mesh, shapes)
            note = f"{config.compute.dtype}, frozen"
            resident.append(Row("reference parameters", kept, note))
        note = "as large as the policy; a function: 0"
        resident.append(Row("reward model", weights, note))
        transient["rollout"] = _rollout(config, model, mesh, machine)
    params = _state(model, config)[0].params
    done, sizes = work(config, model, mesh, machine), dict(mesh.shape)
    first = next(iter(models))  # the model of the update
    own = (f"{first}parameters", f"{first}optimizer state")
    written = sum(row.bytes for row in resident if row.name in own)
    written += _param_bytes(mesh, params)  # gradients
    return Plan(
        config,
        machine,
        sizes,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        tuple(resident),
        {phase: tuple(rows) for phase, rows in transient.items()},
        done,
        roofline(done, machine, sizes, written, config.compute.dtype),
    )


def _state(model: Model, config: RunConfig) -> tuple[TrainState, PyTree]:
    """Shapes of a model under training, and of what of it is not."""
    shapes, frozen = shapes_of(config, model)
    leaves, structure = jax.tree.flatten(shapes)
    return _abstract(structure, tuple(leaves), config.optim), frozen


@functools.lru_cache(maxsize=8)
def _abstract(structure, leaves, optim: OptimConfig) -> TrainState:
    """Kept, as advice asks for it again."""
    return abstract_state(jax.tree.unflatten(structure, leaves), optimizer(optim))


def _param_bytes(mesh, shapes: PyTree) -> int:
    return sharding.shard_bytes(shapes, sharding.param_shardings(mesh, shapes))


def _update(config: RunConfig, model: Model, mesh) -> list[Row]:
    """What a training step needs on top: exact gradients, estimated activations."""
    c, compute = model.config, config.compute
    rows, tensor = _local_rows(config, mesh), mesh.shape["tensor"]
    shapes = whole_shapes(model)
    width = jnp.dtype(compute.dtype).itemsize
    parts = mesh.shape["context"]
    length_multiple(mesh, config.max_length)
    tokens = rows * config.max_length // parts
    # Inside a layer: norms and residuals; q, k, v and output; gate, up and product.
    heads = 2 * c.num_heads + 2 * c.num_kv_heads
    wide = c.intermediate_size
    if c.experts:
        wide = c.experts.per_token * wide + c.experts.shared_size
    inner = 4 * c.hidden_size + (heads * c.head_dim + 3 * wide) / tensor
    layers = 2 if compute.remat else 1 + c.num_layers  # 2: values and cotangents
    stack = tokens * c.hidden_size * width * c.num_layers if compute.remat else 0
    copies = 1 if compute.microbatches == 1 else 2
    layer = sum(x.size for x in jax.tree.leaves(shapes["layers"])) / c.num_layers
    whole = 2 * layer / tensor * width if mesh.shape["fsdp"] * parts > 1 else 0
    kv_heads = c.num_kv_heads / (tensor if c.num_kv_heads % tensor == 0 else 1)
    # Those of all tokens of a row, and their gradients; each twice, by the plain way.
    keys = 2 * tokens * parts * kv_heads * c.head_dim * 2 * width if parts > 1 else 0
    gradients = copies * _param_bytes(mesh, _state(model, config)[0].params)
    result = [
        Row("gradients", gradients, f"float32, {copies} set(s)"),
        Row("layer inputs", int(stack), f"{rows} rows, kept by remat"),
        Row("inside layers", int(tokens * inner * width * layers), "estimate"),
        Row("gathered weights", int(whole), "two layers, estimate"),
        *([Row("gathered keys", int(keys), "with gradients, a layer")] * (keys > 0)),
    ]
    if c.num_labels:
        return result
    chunk = min(DEFAULT_CHUNK_SIZE, update_rows(config) * config.max_length)
    share = max(1, chunk // (mesh.size // tensor))
    return [
        *result,
        Row("logits of a chunk", 3 * share * c.vocab_size // tensor * 4, "float32 x 3"),
        _unembedding(config, model, mesh),
    ]


def _unembedding(config: RunConfig, model: Model, mesh) -> Row:
    """A device's part of it, and of its gradient where it has one; sharding.groups."""
    c, parts = model.config, config.compute.microbatches
    rows = RECIPES[name_of(config)].sides * update_rows(config) // parts
    pieces = mesh.shape["context"]  # of a row, rows by themselves
    size = rows * pieces, config.max_length // pieces
    members = logits_members(mesh, *size, c.vocab_size) or 1
    head = "embed" if c.tie_embeddings else "unembed"
    learned = head in shapes_of(config, model)[0]
    width = jnp.dtype(config.compute.dtype).itemsize + 4 * learned
    size = c.head_width * c.vocab_size // (mesh.shape["tensor"] * members) * width
    note = f"1 / {members} of it" if members > 1 else "gathered"
    return Row("unembedding", size, note + ", and its gradient" * learned)


def _rollout(config: OnlineConfig, model: Model, mesh, machine: Machine) -> list[Row]:
    """What sampling needs on top of the resident arrays."""
    state, frozen = _state(model, config)
    held = frozen or state.params
    size = config.completions, config.max_length
    room = machine.device_bytes or math.inf
    decoder, _ = model.replace(mesh=mesh).on_decoding_mesh(held, *size, room)
    there: Any = decoder.mesh
    weights, cache = decoding_bytes(model, there, held, *size)
    sizes, parts = there.shape, sharding.batch_parts(there)
    rows = -(-config.completions // parts)
    logits = rows * model.config.vocab_size // sizes["tensor"] * 4
    how = ", ".join(f"{name}={n}" for name, n in sizes.items() if n > 1)
    kept = mesh.size == 1 and jnp.dtype(config.compute.dtype) == jnp.float32
    copy = Row("weights to decode with", weights, f"{config.compute.dtype} {how}")
    return [
        *([] if kept else [copy]),
        Row("KV cache", cache, f"{rows} rows x {config.max_length} slots"),
        Row("sampling logits", 3 * logits, "float32 x 3"),
    ]


def _local_rows(config: RunConfig, mesh) -> int:
    """Rows of a micro-batch that one device holds; pairs are two rows."""
    ways, rows = mesh.shape["data"] * mesh.shape["fsdp"], update_rows(config)
    if rows % ways:
        online = isinstance(config, OnlineConfig)
        what = f"a minibatch of {rows} rows" if online else f"batch_size {rows}"
        raise ValueError(
            f"{what} is not a multiple of data*fsdp = {ways}, mesh {dict(mesh.shape)}"
        )
    sides = RECIPES[name_of(config)].sides
    return -(-sides * rows // (config.compute.microbatches * ways))
