"""Low-rank adapters: y = x W + s (x A) B, with A and B in a small tree beside the base.

Hu et al. 2021 (arXiv:2106.09685). A tree of adapters has the keys of the parameters;
beside each kernel that is adapted stand "lora_a" [L, inputs, r], "lora_b" [L, r,
outputs] and "lora_scale" [L], the s of each layer. `join` puts both trees into one,
which `Model.apply` reads: the base's arrays are shared, and without adapters it is the
base. A leaf that the base has as well, such as "score", stands in its place.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jalign import sharding
from jalign.models import families, quantized, tensors
from jalign.models.model import Model, Params

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
DROPOUT = ("lora_seed", "lora_rate")
GROUPS = {"all": "layers/", "attention": "layers/attention/", "mlp": "layers/mlp/"}
# What may be trained in full beside the adapters -> its key among the parameters.
FULL = {"embed": "embed", "head": "unembed", "score": "score"}
_Kernels = dict[str, tensors.Tensor]


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels are adapted, and how.

    Attributes:
      rank: r, columns of A.
      alpha: s = alpha / r; or alpha / sqrt(r) where rank_stabilized (arXiv:2312.03732).
      targets: each one of "all", "attention", "mlp"; or the end of a module's name in
        the Hugging Face format; or a regex for it.
      rank_pattern, alpha_pattern: (regex for the end of a module's full name, value)
        pairs that go before rank and alpha; the first that matches counts, as in PEFT.
        A rank of 0 leaves the module without an adapter.
      rank_stabilized: see alpha.
      train_full: what is trained in full, as a copy: "embed", "head", "score".

    Raises: ValueError naming the field that does not fit.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all",)
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rank_stabilized: bool = False
    train_full: tuple[str, ...] = ()

    def __post_init__(self):
        ranks = [self.rank, *(value for _, value in self.rank_pattern)]
        if self.rank == 0 or any(type(rank) is not int or rank < 0 for rank in ranks):
            raise ValueError(f"rank: {ranks} are not all integers >= 1")
        alphas = [self.alpha, *(value for _, value in self.alpha_pattern)]
        if any(not 0 < alpha < math.inf for alpha in alphas):
            raise ValueError(f"alpha: {alphas} are not all positive")
        if not self.targets:
            raise ValueError('targets is empty; ("all",) takes every linear layer')
        for name in self.train_full:
            if name not in FULL:
                raise ValueError(
                    f"train_full: {name!r} is not one of {', '.join(FULL)}"
                )
        patterns = [pattern for pattern, _ in (*self.rank_pattern, *self.alpha_pattern)]
        for pattern in (*self.targets, *patterns):
            try:
                re.compile(rf"(.*\.)?({pattern})$")  # as it is matched
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regex: {error}") from None

    def scale_of(self, rank: int, alpha: float) -> float:
        """s of an adapter of this rank."""
        if not rank:
            return 0.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Of a module by its full name in the Hugging Face format."""
        return (
            _by_pattern(self.rank_pattern, module, self.rank),
            _by_pattern(self.alpha_pattern, module, self.alpha),
        )


def _by_pattern(pairs: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    matches = (x for key, x in pairs if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def kernels(model: Model) -> _Kernels:
    """Module of a layer, by its Hugging Face name -> its row of the tensor table."""
    return {
        row.in_layer: row
        for row in families.tensors_of(model.config)
        if tensors.is_linear(row.path)
    }


def targeted(model: Model, config: LoraConfig) -> _Kernels:
    """The kernels that are adapted, as `kernels`.

    Raises: ValueError for a target that names none.
    """
    known, chosen = kernels(model), set()
    for target in config.targets:
        if start := GROUPS.get(target):
            found = {m for m, row in known.items() if row.path.startswith(start)}
        else:
            found = {m for m in known if re.fullmatch(rf"(.*\.)?({target})", m)}
        if not found:
            raise ValueError(
                f"targets: {target!r} is none of {', '.join(GROUPS)} and matches no "
                f"linear layer; there are {', '.join(known)}"
            )
        chosen |= found
    return {module: row for module, row in known.items() if module in chosen}


def init(model: Model, params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """New adapters; the adapted model is the base, since B is 0.

    Args:
      model, params: the base. With train_full, or a scalar head, which is always
        trained in full, its leaves are copied.
      config: LoraConfig.
      key: typed PRNG key.

    Returns: the tree of adapters, float32, on the mesh where there is one. A is uniform
      in +-1/sqrt(inputs), as PEFT draws it; where layers have different ranks the
      smaller ones are filled up with zeros, which stay zero.
    Raises: ValueError for a target that names no kernel, or a head that is not there.
    """
    rows = targeted(model, config)
    shapes: dict[str, Any] = flatten_dict(model.param_shapes(), sep="/")

    def draw(key):
        flat = {}
        for number, row in enumerate(rows.values()):
            shape, own = shapes[row.path].shape, jax.random.fold_in(key, number)
            flat |= _fresh(config, row, shape, own)
        return _nested(flat)

    placed, mesh = None, model.mesh
    if mesh is not None:
        placed = sharding.param_shardings(mesh, jax.eval_shape(draw, key))
    adapters = jax.jit(draw, out_shardings=placed)(key)
    full = [*config.train_full, *(["score"] if model.has_scalar_head else [])]
    for name in dict.fromkeys(full):
        if FULL[name] not in params:
            why = "its embedding is its head: name embed" if name == "head" else ""
            raise ValueError(f"train_full: the model has no {name} of its own; {why}")
        adapters[FULL[name]] = jax.tree.map(_master, params[FULL[name]])
    return adapters


def _master(x: jax.Array) -> jax.Array:
    """A float32 copy, which is trained."""
    return jnp.copy(x) if x.dtype == jnp.float32 else x.astype(jnp.float32)


def _fresh(config: LoraConfig, row, shape, key) -> dict[str, jax.Array]:
    """A, B and s of a stacked kernel, by their paths; none where all ranks are 0."""
    layers, inner = shape[0], shape[1:]
    inputs, outputs = inner[: row.num_inputs], inner[row.num_inputs :]
    names = [row.module.format(i) for i in range(layers)]
    ranks, alphas = zip(*map(config.rank_and_alpha, names), strict=True)
    if not any(ranks):
        return {}
    rank, bound = max(ranks), 1 / math.sqrt(math.prod(inputs))
    a = jax.random.uniform(key, (layers, *inputs, rank), jnp.float32, -bound, bound)
    used = jnp.arange(rank)[None] < jnp.asarray(ranks)[:, None]
    used = used.reshape(layers, *(1 for _ in inputs), rank)
    scales = map(config.scale_of, ranks, alphas)
    base = row.path.removesuffix("kernel")
    return {
        base + A: jnp.where(used, a, 0.0),
        base + B: jnp.zeros((layers, rank, *outputs), jnp.float32),
        base + SCALE: jnp.asarray([*scales], jnp.float32),
    }


def join(params: Params, adapters: Mapping[str, Any]) -> Params:
    """The adapted model's parameters: both trees in one, no array copied."""
    joined = dict(params)
    for name, value in adapters.items():
        inner = isinstance(value, Mapping)
        joined[name] = join(params.get(name, {}), value) if inner else value
    return joined


def split(params: Params) -> tuple[Params, Params]:
    """`join`'s inverse, but for leaves trained in full: (base, adapters)."""
    adapters, base = _parted(params, (A, B, SCALE, *DROPOUT))
    return base, adapters


def trainable(adapters: Params) -> tuple[Params, Params]:
    """(what is trained, the scales, which are not)."""
    scales, trained = _parted(adapters, (SCALE,))
    return trained, scales


def is_adapted(params: Params) -> bool:
    """Whether there are adapters among the parameters."""
    return bool(split(params)[1])


def _parted(tree: Params, names: tuple[str, ...]) -> tuple[Params, Params]:
    """(the leaves of these names, the others)."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        parts[path.rpartition("/")[2] not in names][path] = leaf
    return _nested(parts[0]), _nested(parts[1])


def merge(params: Params, *, sign: float = 1.0) -> Params:
    """Kernels with their adapters added, W + s A B, and without them beside.

    Computed in float32, then rounded once to the kernel's dtype.

    Args:
      params: of `join`.
      sign: -1 takes them off again, up to rounding; to have the base bit for bit, keep
        it (`split` gives it back).

    Raises: ValueError where the base is quantized.
    """
    if quantized.is_quantized(params):
        raise ValueError(
            "adapters are not merged into a quantized base, which would round all of "
            "it again: merge them into the full-precision model (jalign merge)"
        )
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    base: dict[str, Any] = flatten_dict(split(params)[0], sep="/")
    for path in [path for path in flat if path.endswith("/" + A)]:
        parent = path.removesuffix(A)
        kernel = base[parent + "kernel"]
        delta = delta_of(flat[path], flat[parent + B], flat[parent + SCALE])
        base[parent + "kernel"] = _add(kernel, sign * delta)
    return _nested(base)


def unmerge(params: Params, adapters: Params) -> Params:
    """What `merge` of these adapters has made, without them, up to rounding."""
    return merge(join(params, adapters), sign=-1.0)


def delta_of(a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """s A B of a stack: [L, ..., r], [L, r, ...], [L] -> float32 [L, ..., ...]."""
    low, high = a.astype(jnp.float32), b.astype(jnp.float32)
    times = functools.partial(jnp.tensordot, axes=1, precision="highest")
    product = jax.vmap(times)(low, high)
    return product * scale.reshape(-1, *(1,) * (product.ndim - 1))


@jax.jit
def _add(kernel: jax.Array, delta: jax.Array) -> jax.Array:
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def with_dropout(params: Params, key: jax.Array, rate: float) -> Params:
    """Parameters whose adapters see x with a share `rate` of it set to 0, the rest
    scaled up by 1 / (1 - rate); the base's products see all of x.

    Args:
      params: of `join`.
      key: typed PRNG key; each module and layer has its own mask, the same whenever the
        same parameters are applied (so also where a layer is computed again).
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for number, path in enumerate([path for path in flat if path.endswith("/" + A)]):
        parent, layers = path.removesuffix(A), flat[path].shape[0]
        seeds = jax.random.bits(jax.random.fold_in(key, number), (layers,))
        flat[parent + DROPOUT[0]] = seeds
        flat[parent + DROPOUT[1]] = jnp.full(layers, rate, jnp.float32)
    return _nested(flat)


def num_parameters(adapters: Params) -> int:
    """Of what is trained."""
    return sum(x.size for x in jax.tree.leaves(trainable(adapters)[0]))


def _nested(flat: Mapping[str, Any]) -> Params:
    return unflatten_dict(flat, sep="/")
