"""What an update computes and what it sends, of one device, counted from shapes.

FLOPs as MFU counts them (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 a
weight and token, and attention, of which causality leaves half. What is computed a
second time stands apart.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jalign.models import Model, ModelConfig
from jalign.plan.recipes import (
    RECIPES,
    name_of,
    shapes_of,
    update_rows,
    whole_shapes,
)
from jalign.sharding import Machine
from jalign.sharding.groups import logits_members
from jalign.train.config import DPOConfig, RunConfig, SFTConfig
from jalign.train.metrics import training_flops_per_token
from jalign.train.online_config import OnlineConfig, PPOConfig
from jalign.types import PyTree

ATTENTION = "attention"
"""The part that kernels compute, not products with weights."""


class Part(NamedTuple):
    """One line of an account.

    Attributes:
      name: as printed.
      amount: FLOPs, bytes or seconds.
      note: why so many.
      axis: of what is sent: the mesh axis between whose devices.
    """

    name: str
    amount: float
    note: str = ""
    axis: str = ""


class Work(NamedTuple):
    """An update of the planned model, on one device.

    Attributes:
      flops: that MFU counts.
      again: FLOPs of what is computed a second time.
      beside: FLOPs outside of the update: a reference's pass, a rollout.
      sent: bytes, at least.
      bound: of what fsdp sends, see `bound`.
    """

    flops: tuple[Part, ...]
    again: tuple[Part, ...]
    beside: tuple[Part, ...]
    sent: tuple[Part, ...]
    bound: float


# Passes that attention kernels add, of 2 products, for scores that they compute again.
_AGAIN_ON_TPU, _AGAIN = 1.5, 0.5  # splash has two backward kernels, others one


def work(config: RunConfig, model: Model, mesh: Any, machine: Machine) -> Work:
    """Of a run on an abstract mesh; every row is taken to be max_length long."""
    c, length = model.config, config.max_length
    trained, frozen = shapes_of(config, model, packed=False)
    rows = RECIPES[name_of(config)].sides * update_rows(config)
    tokens, experts = rows * length / mesh.size, c.share_of_experts
    whole = whole_shapes(model)
    weights = training_flops_per_token(trained, frozen or None, experts=experts)
    scores = attention_flops(c, length) * rows / mesh.size
    layers = forward({"layers": whole["layers"]}, experts)
    if frozen and "layers" in trained:  # adapters
        layers += forward({"layers": trained["layers"]}, experts)
    how = "4 a frozen weight, 6 a trained one" if frozen else "6 a weight and token"
    flops = (
        Part("products with weights", weights * tokens, how),
        Part(ATTENTION, 3 * scores, "causal: half of all pairs of tokens"),
    )
    remat = config.compute.remat
    again = [Part("products of layers", layers * tokens, "--remat")] if remat else []
    on_tpu = machine.chip is not None and machine.chip.torus
    kernel = (_AGAIN_ON_TPU if on_tpu else _AGAIN) + remat
    whose = "forward, and scores for backward" if remat else "scores, for backward"
    again.append(Part(ATTENTION, kernel * scores, whose))
    if not c.num_labels and not isinstance(config, SFTConfig):
        size = 2 * c.head_width * c.vocab_size * tokens
        again.append(Part("logits", size, "a chunk at a time"))
    once = forward(whole, experts) * tokens + scores
    beside = _beside(config, once, forward(whole, experts), mesh)
    sizes = (sum(x.size for x in jax.tree.leaves(t)) for t in (trained, frozen))
    new, kept = (size // mesh.shape["tensor"] for size in sizes)
    cut = mesh.size // (mesh.shape["data"] * mesh.shape["tensor"])
    least = bound(new, cut, kept)
    sent = _sent(config, model, mesh, tokens)
    return Work(flops, tuple(again), beside, sent, least)


def forward(shapes: PyTree, experts: float) -> float:
    """FLOPs of a token's products in a forward pass."""
    return training_flops_per_token(shapes, experts=experts) / 3


def attention_flops(config: ModelConfig, length: int) -> float:
    """Of a row's forward pass: 4 N H for each pair of tokens that sees each other, of
    all layers; length^2 / 2 pairs, fewer with a window."""
    pairs = 0.0
    for kind in config.kind_of_layer:
        window = min(config.kinds[kind].window or length, length)
        pairs += window * length - window**2 / 2
    return 4 * config.num_heads * config.head_dim * pairs


def _beside(
    config: RunConfig, once: float, per_token: float, mesh: Any
) -> tuple[Part, ...]:
    """once: a forward pass over the rows of an update."""
    if isinstance(config, DPOConfig):
        return (Part("reference", once, "a batch, before training starts"),)
    if not isinstance(config, OnlineConfig):
        return ()
    critic = isinstance(config, PPOConfig) and not config.ppo.critic.shared_trunk
    several = config.options.updates_per_rollout > 1 or isinstance(config, PPOConfig)
    names = {"policy": several, "reference": config.has_reference, "critic": critic}
    passes = [name for name, there in names.items() if there]
    batches, tokens = config.options.num_minibatches, config.completions / mesh.size
    sampled = per_token * tokens * config.max_length
    found = [
        Part("sampling", sampled, f"a rollout of {config.completions} completions")
    ]
    if passes:
        flops = len(passes) * once * batches
        found.append(Part("passes", flops, "of " + ", ".join(passes)))
    updates = config.options.updates_per_rollout
    if critic:
        note = f"{updates} a rollout"
        found.append(Part("critic's updates", 3 * once * updates, note))
    return tuple(found)


def _sent(
    config: RunConfig, model: Model, mesh: Any, tokens: float
) -> tuple[Part, ...]:
    """At least, in the dtype of the products. tokens: of an update, over all chips."""
    c, parts = model.config, config.compute.microbatches
    data, context, tensor = (mesh.shape[x] for x in ("data", "context", "tensor"))
    fsdp = mesh.shape["fsdp"] * context  # that weights are cut over
    width, ring = jnp.dtype(config.compute.dtype).itemsize, 1 - 1 / fsdp
    trained, frozen = shapes_of(config, model)
    held = frozen.get("layers", {}) if frozen else trained["layers"]
    new = sum(x.size for x in jax.tree.leaves(trained["layers"]))
    here = tokens * tensor  # of a device's own rows: members of tensor share them
    words = f"{parts} x " if parts > 1 else ""
    gathered = parts * _moved(held, width) / tensor * ring
    found = [
        Part("weights, forward", gathered, f"{words}gathered", "fsdp"),
        Part("weights, backward", gathered, f"{words}gathered", "fsdp"),
        Part("gradients", parts * new * width / tensor * ring, "reduced", "fsdp"),
    ]
    if not c.num_labels and fsdp > 1:
        rows = RECIPES[name_of(config)].sides * update_rows(config) // parts
        size = rows * context, config.max_length // context
        k = logits_members(mesh, *size, c.vocab_size) or 1
        states = 4 * width * (k - 1) * here * c.head_width
        table = c.vocab_size * c.head_width / (k * tensor) * (1 - k / fsdp)
        states += parts * 4 * width * table
        found.append(Part("unembedding", states, f"groups of {k}", "fsdp"))
    moved = 2 * width * here * c.hidden_size * ring
    found.append(Part("embedding", moved, "features of tokens", "fsdp"))
    if context > 1:
        # Both once in each pass over the layers, and their gradients.
        each = c.num_layers * 2 * c.num_kv_heads * c.head_dim * width / tensor
        times = (2 if config.compute.remat else 1) + 2  # gradients are float32
        size = times * each * here * (context - 1)
        found.append(Part("keys and values", size, "of whole rows", "context"))
    if tensor > 1:
        sums = (6 if config.compute.remat else 4) * c.num_layers
        size = 2 * (1 - 1 / tensor) * width * here * c.hidden_size
        found.append(Part("activations", sums * size, f"{sums} sums", "tensor"))
    if data > 1:
        size = 2 * (1 - 1 / data) * 4 * new / (fsdp * tensor)
        found.append(Part("gradients of copies", size, "float32", "data"))
    return tuple(part for part in found if part.amount)


def _moved(shapes: PyTree, width: int) -> float:
    """Bytes of weights: codes as they are, the rest in the dtype of the products."""
    leaves = jax.tree.leaves(shapes)
    return sum(x.size * min(width, x.dtype.itemsize) for x in leaves)


def bound(trained: int, fsdp: int, frozen: int = 0) -> float:
    """Bytes that a chip sends where each weight crosses the wire in bfloat16 as often
    as it must: gathered for the forward and for the backward pass, its gradient, where
    it has one, reduced."""
    return 2 * (3 * trained + 2 * frozen) * (fsdp - 1) / fsdp


def total(parts: Any) -> float:
    """The sum of their amounts."""
    return math.fsum(part.amount for part in parts)
