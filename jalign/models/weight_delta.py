"""Weight deltas: target - base, so that who has the base can make the target of it.

As Vicuna was published (Chiang et al. 2023); in float32, and with digests, so that
what comes out is the target, bit for bit, or an error.
"""

import hashlib
from pathlib import Path

import numpy as np

from jalign.models import hf_files
from jalign.models.config import ModelConfig
from jalign.models.hf_checkpoints import (
    Out,
    check_alike,
    file_shapes,
    opened,
    read,
    write,
)
from jalign.models.hf_files import WeightFiles
from jalign.models.hf_writing import DTYPES, Written

# Not the name of a model's weights: nothing loads a delta as a model.
DELTA_WEIGHTS = "delta.safetensors"
# Beside "NAME": places int32 [n, axes] at which base + delta, in float32 and rounded to
# the target's dtype, is not the target; and its own values there, float32 [n].
_PLACES, _VALUES = "{}.exact_at", "{}.exact"


def make_delta(target: Path, base: Path, out: Out) -> str:
    """Writes target - base in float32: who has the base can make the target of it.

    As Vicuna was published (Chiang et al. 2023). Where base + delta, in float32 and
    rounded to the target's dtype, would miss the target, its own values stand beside.

    Args:
      target, base: folders. What the base lacks, as a reward head, is there whole.
      out: config and tokenizer of the target.

    Returns: the digest of the target's weights, 64 hex digits.
    Raises: as `average`.
    """
    check_alike([target, base], but={"num_labels"})
    digests: list[str] = []
    with opened([target, base]) as (targets, bases):

        def make(name: str) -> Written:
            x = read(targets, name)
            digests.append(_digest(x))
            note = f"{targets.dtype(name)} {digests[-1]}"
            return Written(_difference(name, x, _start(bases, name, x.shape)), note)

        dtypes = dict.fromkeys(targets, np.dtype(np.float32))
        write(out, targets, dtypes, make, name=DELTA_WEIGHTS, most_arrays=3)
    return _whole(digests)


def apply_delta(base: Path, delta: Path, out: Out) -> str:
    """Writes the target that a weight delta was made of, the very same weights.

    Args:
      base: folder of the model that it was made with.
      delta: folder that `make_delta` wrote.
      out: config and tokenizer of the delta.

    Returns: the digest of the weights, as `make_delta` gave it.
    Raises: as `average`; ValueError naming the tensor whose digest is another one.
    """
    check_alike([delta, base], but={"num_labels"})
    digests: list[str] = []
    with opened([base]) as (bases,), WeightFiles(delta, DELTA_WEIGHTS) as deltas:
        dtypes = _delta_dtypes(out.config, deltas)

        def make(name: str) -> Written:
            start = _start(bases, name, deltas.shape(name))
            x = _restored(deltas, name, start, dtypes[name])
            digests.append(_digest(x))
            if digests[-1] != deltas.note(name).split()[-1]:
                raise ValueError(
                    f"{name} of {base} with {delta} is not the target's, by its "
                    "digest: is it another base than the delta was made with?"
                )
            return Written({name: x})

        write(out, deltas, dtypes, make)
    return _whole(digests)


def _start(bases: WeightFiles, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The base's tensor in float32; 0 where it has none."""
    if name not in bases:
        return np.zeros(shape, np.float32)
    return read(bases, name).astype(np.float32)


def _difference(name: str, x: np.ndarray, start: np.ndarray) -> dict[str, np.ndarray]:
    delta = x.astype(np.float32) - start
    missed = _bits((start + delta).astype(x.dtype)) != _bits(x)
    if not missed.any():
        return {name: delta}
    places = np.argwhere(missed).astype(np.int32)
    values = x[missed].astype(np.float32)
    return {name: delta, _PLACES.format(name): places, _VALUES.format(name): values}


def _restored(deltas: WeightFiles, name: str, start, dtype: np.dtype) -> np.ndarray:
    start += read(deltas, name)
    x = start.astype(dtype)
    if _PLACES.format(name) in deltas:
        places = read(deltas, _PLACES.format(name))
        x[tuple(places.T)] = read(deltas, _VALUES.format(name)).astype(dtype)
    return x


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")  # so that -0.0 is not 0.0


def _digest(x: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes, 64 hex digits."""
    told = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    told.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return told.hexdigest()


def _whole(digests: list[str]) -> str:
    """One for all tensors, whatever their order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _delta_dtypes(config: ModelConfig, deltas: WeightFiles) -> dict[str, np.dtype]:
    """Those of the target. Raises ValueError where it is no delta that is whole."""
    shapes = file_shapes(config)
    problems, dtypes = list(deltas.problems), {}
    for name, shape in shapes.items():
        if name not in deltas:
            problems.append(f"missing tensor {name}")
        elif deltas.shape(name) != shape or deltas.dtype(name) != "F32":
            got = f"{deltas.dtype(name)} {deltas.shape(name)}"
            problems.append(f"{name} is {got}, and has to be F32 {shape}")
        elif (dtype := DTYPES.get(deltas.note(name).partition(" ")[0])) is None:
            problems.append(f"{name} has no digest: jalign merge --method delta has it")
        else:
            dtypes[name] = np.dtype(dtype)
    if problems:
        raise ValueError(hf_files.report(deltas.folder, problems))
    return dtypes
