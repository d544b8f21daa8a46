"""Kernels in 4 or 8 bits: NF4 with double quantization, and int8 with a scale per row.

Dettmers et al. 2023, QLoRA (arXiv:2305.14314); the constants and blocks are those of
bitsandbytes, so that its files are taken over as they are. In the parameters a
quantized kernel is a dict of leaves in the kernel's place. The shapes of one layer, of
I inputs and outputs [...]:

  nf4             uint8 [blocks, 32, ...], two codes a byte: in the high bits the
                  block's first half, in the low ones its second
  absmax          uint8 or float32 [blocks, ...], the largest magnitude of each block
  nested_absmax   float32 [groups], where absmax is quantized too: of 256 blocks each
  nested_offset   float32 [], the mean that was taken off absmax before
  int8            int8, as the kernel
  scale           float32 [...], the step of each output's row

A block is 64 inputs of one output. Where I is no multiple of 64 each row's last block
is partly empty; bitsandbytes' blocks run over into the next row instead. Neighbours in
one byte, as bitsandbytes has them, a TPU would have to move apart one by one.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

METHODS = ("nf4", "int8")
CODES_PER_BYTE = {"nf4": 2, "int8": 1}  # by the leaf that holds them
BLOCK, GROUP = 64, 256  # weights to an absmax, absmaxes to a nested one
Leaves = Mapping[str, jax.Array]

# arXiv:2305.14314, appendix E: quantiles of a normal distribution, of mass alike.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)


def dynamic_map() -> np.ndarray:
    """The 256 values of a quantized absmax, float32, ascending.

    Dettmers 2016 (arXiv:1511.04561): in the decade 10^-i there are 2^(6 - i) values of
    each sign, evenly spread; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        middles = (bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (i - 6)
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


_DYNAMIC = dynamic_map()


def quantize(
    kernel: jax.Array, method: str, *, num_inputs: int = 1, double: bool = True
) -> dict[str, jax.Array]:
    """One layer's kernel as codes.

    Codes are those of exact arithmetic on the kernel's float32 values.

    Args:
      kernel: float [inputs..., outputs...].
      method: "nf4": the nearest of 16 values times the absmax of the block, ties to the
        lower one. "int8": round(w / scale), ties to even, scale = absmax of the row
        over 127.
      num_inputs: how many axes are inputs.
      double: nf4's absmax is quantized as well: 4.13 bits a weight rather than 4.5.

    Returns: the leaves, see above.
    """
    check_method(method)
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    rows = kernel.astype(jnp.float32).reshape(math.prod(inputs), *outputs)
    if method == "int8":
        scale = jnp.abs(rows).max(0) / 127
        codes = _nearest(rows, scale[None])
        return {"int8": codes.reshape(kernel.shape), "scale": scale}
    spare = -len(rows) % BLOCK
    rows = jnp.pad(rows, [(0, spare)] + [(0, 0)] * len(outputs))
    blocks = rows.reshape(-1, BLOCK, *outputs)
    absmax = jnp.abs(blocks).max(1)
    unit = jnp.where(absmax == 0, 1, absmax)  # zeros have the code of 0
    middles = _middles(NF4).reshape(-1, *(1 for _ in absmax.shape))
    bounds = _floor_product(jnp.broadcast_to(unit, (15, *unit.shape)), middles)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for bound in bounds:
        codes += blocks > bound[:, None]
    leaves = {"nf4": codes[:, : BLOCK // 2] << 4 | codes[:, BLOCK // 2 :]}
    return leaves | (_nested(absmax) if double else {"absmax": absmax})


def check_method(method: str) -> None:
    """Raises ValueError for what is none of METHODS."""
    if method not in METHODS:
        raise ValueError(f"quantize={method!r} is not one of {', '.join(METHODS)}")


def _middles(table: np.ndarray) -> np.ndarray:
    return (table[1:] + table[:-1]) / 2


def _halves(x):
    """x as a sum of two floats of 12 bits: products of such are exact."""
    bits = jax.lax.bitcast_convert_type(jnp.float32(x), jnp.uint32) >> 12 << 12
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def _floor_product(x: jax.Array, y: np.ndarray) -> jax.Array:
    """The largest float32 <= x y: a float32 is above this where it is above x y."""
    (x1, x2), (y1, y2) = _halves(x), _halves(y)
    product = x * y
    rest = ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2
    return jnp.where(rest < 0, jnp.nextafter(product, -jnp.inf), product)


def _nearest(x: jax.Array, scale: jax.Array) -> jax.Array:
    """round(x / scale) to int8, as if divided exactly."""
    scale = jnp.where(scale == 0, 1, scale)
    code = jnp.round(x / scale)
    high, low = _halves(scale)

    def beyond(half):  # x - (code + half) scale: its sign is exact
        return (x - (code + half) * high) - (code + half) * low

    odd = code % 2 != 0
    up, down = beyond(0.5), beyond(-0.5)
    code += jnp.where((up > 0) | odd & (up == 0), 1, 0)
    code -= jnp.where((down < 0) | odd & (down == 0), 1, 0)
    return code.astype(jnp.int8)


def _nested(absmax: jax.Array) -> dict[str, jax.Array]:
    """absmax [blocks, ...] quantized: groups run along the blocks of a row, then on."""
    flat = absmax.reshape(len(absmax), -1).T.reshape(-1)
    offset = flat.mean()
    groups = jnp.pad(flat - offset, (0, -flat.size % GROUP)).reshape(-1, GROUP)
    nested = jnp.abs(groups).max(1)
    unit = jnp.where(nested == 0, 1, nested)
    codes = jnp.searchsorted(_middles(_DYNAMIC), groups / unit[:, None])
    codes = codes.astype(jnp.uint8).reshape(-1)[: flat.size]
    return {
        "absmax": codes.reshape(-1, len(absmax)).T.reshape(absmax.shape),
        "nested_absmax": nested,
        "nested_offset": offset,
    }


def dequantize(
    leaves: Leaves,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    keep: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """The kernel that the leaves of a layer stand for.

    Args:
      leaves: of `quantize`.
      shape: the kernel's.
      dtype: what the float32 values are rounded to.
      keep: of `models.platform`: its argument is read often, and computed once.
    """
    if "int8" in leaves:
        values = leaves["int8"].astype(jnp.float32)
        scale = jnp.broadcast_to(leaves["scale"], values.shape)
        return (values * scale).astype(dtype)
    packed = leaves["nf4"].astype(jnp.int32)
    halves = jnp.stack([_lookup(NF4, packed >> 4), _lookup(NF4, packed & 15)], 1)
    values = (halves * _absmax(leaves, keep)[:, None, None]).astype(dtype)
    rows = values.reshape(-1, *packed.shape[2:])
    return rows[: math.prod(shape) // math.prod(packed.shape[2:])].reshape(shape)


def _absmax(leaves: Leaves, keep: Callable[[jax.Array], jax.Array]) -> jax.Array:
    absmax = leaves["absmax"]
    if "nested_absmax" not in leaves:
        return absmax
    rows = absmax.reshape(len(absmax), -1).T
    units = jnp.repeat(leaves["nested_absmax"], GROUP)[: absmax.size]
    rows = _dynamic(rows) * units.reshape(rows.shape) + leaves["nested_offset"]
    return keep(rows).T.reshape(absmax.shape)


def _lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
    """table[index] of 2^n entries, bit by bit: a gather is slow on a TPU.

    The first bit chooses by a sum, which is exact where neighbours are no further apart
    than the upper one from 0. A choice between constants jax would lift out of a scan,
    as arrays of the index' size.
    """
    bit = (index & 1).astype(jnp.float32)
    values = [
        bit * (high - low) + low
        for low, high in zip(table[::2], table[1::2], strict=True)
    ]
    while len(values) > 1:
        index = index >> 1
        on = index & 1 != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(on, high, low) for low, high in pairs]
    return values[0]


# dynamic_map as the first value and the step of each decade, and 1 at the end.
_STEPS = np.array([0.9 / 2**i * 10.0 ** (i - 6) for i in range(7)] + [0])
_FIRST = np.array([10.0 ** (i - 7) + _STEPS[i] / 2 for i in range(7)] + [1])


def _dynamic(codes: jax.Array) -> jax.Array:
    """dynamic_map()[codes], up to an ulp or two."""
    signed = codes.astype(jnp.int32) - 127
    place = jnp.maximum(jnp.abs(signed), 1)  # 2^decade + number in the decade
    decade = 31 - jax.lax.clz(place)
    number = (place - (1 << decade)).astype(jnp.float32)
    first, step = (_lookup(x.astype("f4"), decade) for x in (_FIRST, _STEPS))
    return jnp.sign(signed) * (first + number * step)
