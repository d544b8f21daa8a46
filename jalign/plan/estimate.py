"""The estimate: exact bytes of states by eval_shape, formulas for the rest; as text."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jalign import sharding
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE
from jalign.models import Model
from jalign.plan.recipes import (
    RECIPES,
    name_of,
    optimizer,
    shapes_of,
    trained,
    update_rows,
)
from jalign.sharding import Machine
from jalign.sharding.context import length_multiple
from jalign.train.config import OptimConfig, RunConfig
from jalign.train.online_config import OnlineConfig
from jalign.train.online_models import reference_params
from jalign.train.step import abstract_state
from jalign.types import PyTree, TrainState

GIB = 2**30
_USABLE = 0.92  # the rest goes to the runtime, to programs and to fragmentation


class Row(NamedTuple):
    """One line of the table: bytes on each device, and what they are."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """The memory of one device.

    Attributes:
      config: the run's.
      machine: where it runs.
      mesh: axis name -> size.
      num_parameters: of the trained policy (or reward model).
      resident: rows of what stays for the whole run.
      transient: phase -> rows of what lives within it; phases take turns.
      compiled: the compiler's own rows for the training step, if asked for.
      advice: what to change; empty where it fits.
    """

    config: RunConfig
    machine: Machine
    mesh: dict[str, int]
    num_parameters: int
    resident: tuple[Row, ...]
    transient: dict[str, tuple[Row, ...]]
    compiled: tuple[Row, ...] = ()
    advice: str = ""

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
        if self.machine.device_bytes is None:
            return None
        return self.peak <= _USABLE * self.machine.device_bytes

    def __str__(self) -> str:
        return _table(self)


def estimate(config: RunConfig, model_config, mesh, machine: Machine) -> Plan:
    """The plan of a run on an abstract mesh.

    Raises: ValueError where the mesh does not divide the model or the batch.
    """
    models = trained(config, model_config, None)
    model = next(iter(models.values()))
    whole = model.param_shapes()
    weights = _param_bytes(mesh, whole)
    resident: list[Row] = []
    digits = config.lora.quantize or config.compute.dtype
    for name, each in models.items():
        state, frozen = _state(each, config)
        places = sharding.state_shardings(mesh, state).opt_state
        moments = _shard_bytes(state.opt_state, places)
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
        note = "if as large as the policy; 0 for a function"
        resident.append(Row("reward model", weights, note))
        transient["rollout"] = _rollout(config, model, mesh)
    return Plan(
        config,
        machine,
        dict(mesh.shape),
        sum(leaf.size for leaf in jax.tree.leaves(_state(model, config)[0].params)),
        tuple(resident),
        {phase: tuple(rows) for phase, rows in transient.items()},
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
    return _shard_bytes(shapes, sharding.param_shardings(mesh, shapes))


def _shard_bytes(shapes: PyTree, shardings: PyTree) -> int:
    def size(leaf, placed):
        return math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def _update(config: RunConfig, model: Model, mesh) -> list[Row]:
    """What a training step needs on top: exact gradients, estimated activations."""
    c, compute = model.config, config.compute
    rows, tensor = _local_rows(config, mesh), mesh.shape["tensor"]
    shapes = model.param_shapes()
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
    unembedding = c.hidden_size * c.vocab_size // tensor * (width + 4)
    return result + [
        Row("logits of a chunk", 3 * share * c.vocab_size // tensor * 4, "float32 x 3"),
        Row("unembedding", unembedding, "gathered, and its gradient"),
    ]


def _rollout(config: OnlineConfig, model: Model, mesh) -> list[Row]:
    """What sampling needs on top of the resident arrays."""
    c = model.config
    tensor = mesh.shape["tensor"]
    kv_heads = c.num_kv_heads // tensor if c.num_kv_heads % tensor == 0 else 0
    rows = -(-config.completions // (mesh.shape["data"] * mesh.shape["fsdp"]))
    width = jnp.dtype(config.compute.dtype).itemsize
    slots = rows * config.max_length * c.num_layers
    cache = 2 * slots * (kv_heads or c.num_kv_heads) * c.head_dim * width
    logits = rows * c.vocab_size // tensor * 4
    return [
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


def _table(p: Plan) -> str:
    c, compute = p.config, p.config.compute
    group = f"{c.group_size} x " if isinstance(c, OnlineConfig) else ""
    mesh = ", ".join(f"{name}={size}" for name, size in p.mesh.items())
    lines = [
        f"{name_of(c)} of {c.model}: {p.num_parameters / 1e9:.3g} B parameters",
        f"on {p.machine.num_devices} x {p.machine.kind}, mesh {mesh}",
        f"{c.batch_size} x {group}{c.max_length} tokens in {compute.microbatches} "
        f"micro-batch(es), {compute.dtype}, {'remat' if compute.remat else 'no remat'}"
        f", {c.optim.optimizer}",
        "",
        f"{'on each device':<28}{'GiB':>9}",
        *map(_line, p.resident),
    ]
    for phase, rows in p.transient.items():
        lines += [f"  during {phase}", *map(_line, rows)]
    lines += [_line(Row("peak (estimate)", p.total, ""))]
    if p.compiled:
        total = Row("peak (compiled)", sum(row.bytes for row in p.compiled), "")
        lines += ["", "the compiler's own account of the training step"]
        lines += map(_line, (*p.compiled, total))
    verdict = {True: "fits", False: "does NOT fit", None: "capacity unknown"}[p.fits]
    size = p.machine.device_bytes
    room = f" in {size / GIB:.0f} GiB ({_USABLE:.0%} usable)" if size else ""
    return "\n".join([*lines, "", verdict + room, *filter(None, [p.advice])])


def _line(row: Row) -> str:
    return f"  {row.name:<26}{row.bytes / GIB:9.3f}  {row.note}".rstrip()
