"""Kernels read as codes: quantized while they are read, or taken over as they are."""

import json
import math
from collections.abc import Callable

import jax
import numpy as np

from jalign.models.hf_files import WeightFiles
from jalign.models.hf_headers import ADVICE, STATE, is_stored_in_4_bits
from jalign.models.quantize import BLOCK, GROUP, NF4, dynamic_map, quantize
from jalign.models.tensors import Tensor, is_linear

_quantize = jax.jit(quantize, static_argnames=("method", "num_inputs"))
Stack = dict[str, np.ndarray]


def read(
    files: WeightFiles,
    row: Tensor,
    shape: tuple[int, ...],
    method: str | None,
    whole: Callable[[str], np.ndarray],
) -> Stack | None:
    """The leaves of a quantized kernel, layers stacked; None where it stays as it is.

    Whole layers are read, one at a time, by every process: blocks and the groups of
    absmaxes do not depend on the mesh.

    Args:
      files: the checkpoint.
      row: of the kernel.
      shape: of the stacked kernel.
      method: one of quantize.METHODS, or None.
      whole: a tensor's name -> the float32 kernel of that layer.

    Raises: ValueError for a kernel that is stored in 4 bits, but not as can be read.
    """
    if not is_linear(row.path):
        return None
    names = row.names(shape)
    stored = is_stored_in_4_bits(files, names)
    if not (stored or method):
        return None
    if stored and method not in (None, "nf4"):
        raise ValueError(
            f"{files.folder} is stored in nf4: quantize={method!r} would round it "
            f"twice; leave quantize out, or give the full-precision model"
        )
    stack: Stack = {}
    for i, name in enumerate(names):
        if stored:
            leaves = _taken_over(files, name, row, shape[1:])
        else:
            assert method is not None
            leaves = _quantize(whole(name), method=method, num_inputs=row.num_inputs)
        for leaf, value in leaves.items():
            x = np.asarray(value)
            stack.setdefault(leaf, np.empty((len(names), *x.shape), x.dtype))[i] = x
    return stack


def _taken_over(
    files: WeightFiles, name: str, row: Tensor, shape: tuple[int, ...]
) -> Stack:
    """A layer's leaves out of bitsandbytes' tensors, without rounding.

    Its blocks run along the file's rows, which have the outputs first: so do ours,
    where a row has whole blocks.
    """
    inputs, outputs = math.prod(shape[: row.num_inputs]), shape[row.num_inputs :]
    where = f"{files.folder}: {name}"
    if inputs % BLOCK:
        raise ValueError(
            f"{where}: 4-bit blocks of {BLOCK} run over the ends of its rows of "
            f"{inputs}, which is not read; {ADVICE}"
        )

    def part(suffix: str) -> np.ndarray:
        return files.read(f"{name}.{suffix}")

    def turned(x: np.ndarray) -> np.ndarray:
        """[outputs x blocks x n] -> [blocks, n, outputs...]."""
        x = x.reshape(math.prod(outputs), inputs // BLOCK, -1).transpose(1, 2, 0)
        return x.reshape(*x.shape[:2], *outputs)

    nested = f"{name}.nested_absmax" in files
    state = _state(part(STATE), where)
    wanted = {"quant_type": "nf4", "blocksize": BLOCK}
    wanted["shape"] = [math.prod(outputs), inputs]
    if nested:
        wanted |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
    for key, value in wanted.items():
        if state.get(key) != value:
            raise ValueError(
                f"{where}: {key} is {state.get(key)!r}, not {value!r}; {ADVICE}"
            )
    tables = {"quant_map": NF4} | (
        {"nested_quant_map": dynamic_map()} if nested else {}
    )
    for key, table in tables.items():
        if not np.allclose(part(key), table, rtol=1e-6, atol=1e-9):
            raise ValueError(f"{where}: its {key} is not that of nf4; {ADVICE}")
    leaves = {
        "nf4": turned(_by_halves(files.read(name))),
        "absmax": turned(part("absmax"))[:, 0],
    }
    if nested:
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise ValueError(f"{where}: nested_offset is {offset!r}, not a number")
        leaves["nested_absmax"] = part("nested_absmax")
        leaves["nested_offset"] = np.asarray(offset, np.float32)
    if not all(np.isfinite(x).all() for x in leaves.values()):
        raise ValueError(f"{where}: its absmax is not finite")
    return leaves


def _by_halves(packed: np.ndarray) -> np.ndarray:
    """Bytes with two neighbours each -> with one code of each half of a block."""
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, BLOCK)
    return codes[:, : BLOCK // 2] << 4 | codes[:, BLOCK // 2 :]


def _state(data: np.ndarray, where: str) -> dict:
    try:
        state = json.loads(data.tobytes())
    except ValueError as error:
        raise ValueError(f"{where}: its {STATE} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{where}: its {STATE} is not a JSON object")
    return state
