"""Whether arrays are read back as they were written: their digests, and what counts as
damage.

A digest does not depend on how arrays are sharded. Orbax notices no flipped bit in the
data it reads; this does. It guards against rot and mixed-up files, not against an
attacker. A step that is damaged is given up; one that cannot be reached (permissions, a
failing disk, memory) is as good as it was once the cause is gone.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jalign import sharding
from jalign.paths import open_to_read
from jalign.types import PyTree

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32 [2]: the sum of all words, and their sum weighted by a hash of the place.

    Additions of uint32 wrap exactly, so every mesh gives the same digest.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    words = words.astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(16777619) + index
    # The finalizer of a 32-bit hash; odd, so that no word is multiplied away.
    place = (place ^ place >> 16) * jnp.uint32(0x7FEB352D)
    place = (place ^ place >> 15) * jnp.uint32(0x846CA68B)
    place = (place ^ place >> 16) | jnp.uint32(1)
    sums = words.sum(dtype=jnp.uint32), (words * place).sum(dtype=jnp.uint32)
    return jnp.stack(sums)


_digests = jax.jit(lambda leaves: [leaf_digest(x) for x in leaves])


def tree_digest(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> 16 hex digits. Collective: every process calls it.

    Args:
      tree: jax.Arrays without typed PRNG keys (take their key data).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = sharding.gather(_digests([leaf for _, leaf in leaves]))
    return {
        _name(path): "".join(f"{int(word):08x}" for word in pair)
        for (path, _), pair in zip(leaves, sums, strict=True)
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_specs(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> "float32[2,3]", for arrays or ShapeDtypeStructs."""
    return {
        _name(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def without_keys(tree: PyTree, shapes: bool = False) -> PyTree:
    """Typed PRNG keys -> their uint32 data."""

    def strip(x):
        if not _is_key(x):
            return x
        if not shapes:
            return jax.random.key_data(x)
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

    return jax.tree.map(strip, tree)


def with_keys(tree: PyTree, abstract: PyTree) -> PyTree:
    """The inverse: key data -> keys where `abstract` has keys."""

    def wrap(x, like):
        if not _is_key(like):
            return x
        impl = str(jax.random.key_impl(jnp.empty((), like.dtype)))
        return jax.random.wrap_key_data(x, impl=impl)

    return jax.tree.map(wrap, tree, abstract)


# Of tensorstore's messages.
_OS_ERROR = re.compile(r"OS error (\d+)")
_NO_DAMAGE = re.compile(
    r"PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|CANCELLED"
    r"|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED"
)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Damaged(Exception):
    """A step that cannot be read back as it was written."""


def agreed(read: Callable[[], Any]) -> Any:
    """read() on every process; an error on all of them where one has it."""
    result, error = None, None
    try:
        result = read()
    except (Damaged, OSError, MemoryError) as fault:
        error = fault
    if jax.process_count() > 1:
        kind = 0 if error is None else 1 if isinstance(error, Damaged) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.asarray(kind))))
        if error is None and worst:
            text = "another process cannot read it"
            error = Damaged(text) if worst == 1 else OSError(f"checkpoint: {text}")
    if error is not None:
        raise error
    return result


def check_readable(
    path: Path, error: BaseException, files: Iterable[Path] = ()
) -> None:
    """Raises what is behind an error, unless it is that the bytes themselves are bad.

    Args:
      path: of the step.
      error: what reading it has raised.
      files: to read once more, whatever the error says: it may hide its cause.

    Raises: MemoryError; OSError for anything but a missing file.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise MemoryError(f"not enough memory to read {path}") from error
        text, number = str(cause), getattr(cause, "errno", None)
        if found := _OS_ERROR.search(text):
            number = int(found[1])
        if number is not None and number not in _MISSING:
            said = getattr(cause, "strerror", None) or os.strerror(number)
            raise OSError(number, said, str(path)) from error
        if number is None and _NO_DAMAGE.search(text):
            raise OSError(f"{path} cannot be read: {first_line(cause)}") from error
        cause = cause.__cause__ or cause.__context__
    for file in files:
        if file.is_file():
            with open_to_read(file) as data:
                while data.read(1 << 24):
                    pass


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
