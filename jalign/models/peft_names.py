"""How PEFT's files name and lay out a model's adapters.

A low-rank pair has A [r, inputs] and B [outputs, r], by the name of its linear layer;
names and regroupings are read off the kernel's row of families.tensors_of.
"""

from functools import lru_cache, partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from jalign.models import families, lora
from jalign.models.lora import LoraConfig
from jalign.models.model import Model
from jalign.models.tensors import Tensor, file_shape as shape_in_file, sides_of
from jalign.sharding.rules import axes_of

PREFIX = "base_model.model."


def tied_names(model: Model) -> tuple[str, str]:
    """(PEFT's copy of the head, the embedding), where one matrix is both."""
    copy, original = families.tied_names(model.config)
    return PREFIX + copy, PREFIX + original


def low_rank(row: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of A and B beside a kernel's."""
    ins, outs = sides_of(row.path)
    name, base = PREFIX + row.module, row.path.removesuffix("kernel")
    return (
        Tensor(f"{name}.lora_A.weight", base + lora.A, f"rank {ins}"),
        Tensor(f"{name}.lora_B.weight", base + lora.B, f"{outs} rank"),
    )


def full_copies(model: Model) -> dict[str, Tensor]:
    """What can be trained in full (lora.FULL) and this model has -> its row."""
    names = {top: name for name, top in lora.FULL.items()}
    found = {}
    for row in families.tensors_of(model.config):
        if name := names.get(row.path.partition("/")[0]):
            found[name] = row._replace(name=PREFIX + row.name)
    return found


def needs_two_copies(model: Model) -> bool:
    """Whether one matrix here is two in PEFT, which trains embedding and head apart."""
    return model.config.tie_embeddings and not model.config.num_labels


@lru_cache(maxsize=8)  # it is asked for twice a file, and traces the model
def leaf_shapes(model: Model, config: LoraConfig) -> dict[str, Any]:
    """Path -> jax.ShapeDtypeStruct of every leaf of the adapters; as lora.init."""
    init = partial(lora.init, model.replace(mesh=None), config=config)
    tree = jax.eval_shape(init, params=model.param_shapes(), key=jax.random.key(0))
    return flatten_dict(tree, sep="/")


def axis_sizes(row: Tensor, shape: tuple[int, ...]) -> dict[str, int]:
    """Axis -> size, of a parameter of this shape; without the layers."""
    axes = axes_of(row.path) or ()
    pairs = zip(axes[row.stacks :], shape[row.stacks :], strict=True)
    return {axis: size for axis, size in pairs if axis}


def file_shape(row: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    """A tensor's shape in the file."""
    right = row.pattern.split(" -> ")[1].split()
    return shape_in_file(row.pattern, tuple(sizes[axis] for axis in right))
