"""A checkpoint's kernels in bitsandbytes' 4-bit layout, written by NumPy in float64.

After bitsandbytes 0.50's functional.py: `quantize_4bit`, `create_dynamic_map`,
`QuantState.as_dict`; each weight becomes a flat list of blocks of 64, row by row.
"""

import json
import re

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import ndtri

KERNEL = re.compile(r"model\.layers\..*_proj\.weight")


def normal_map() -> np.ndarray:
    """The 16 values of nf4 by their formula, float64, ascending."""
    offset = 0.9677083
    above = ndtri(np.linspace(offset, 0.5, 9)[:-1])
    below = -ndtri(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    return values / values.max()


def dynamic_map() -> np.ndarray:
    """The 256 values of a quantized absmax, float64, ascending."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        for low, high in zip(edges, edges[1:], strict=False):
            middle = (low + high) / 2 * 10.0 ** (i - 6)
            values += [middle, -middle]
    return np.sort(values)


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest value by middles in the table's dtype, ties to the lower."""
    middles = (table[1:] + table[:-1]) / 2
    return np.searchsorted(middles, x, side="left").astype(np.uint8)


def blocks_of(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat x in rows of `size`, filled up with zeros, and each row's absmax."""
    rows = np.pad(x, (0, -len(x) % size)).reshape(-1, size)
    absmax = np.abs(rows).max(1)
    return rows / np.where(absmax == 0, 1, absmax)[:, None], absmax


def write(weight: np.ndarray, nf4: np.ndarray, nested: bool):
    """A weight [outputs, inputs] -> its tensors by suffix, and the weight they mean."""
    scaled, absmax = blocks_of(weight.astype("f8").ravel(), 64)
    codes = nearest(scaled, nf4)
    flat = codes.ravel()[: weight.size]
    out = {"": (flat[::2] << 4 | flat[1::2])[:, None], ".quant_map": nf4}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    if nested:
        table = dynamic_map().astype("f4")
        offset = float(np.float32(absmax.mean()))
        scaled, more = blocks_of(absmax - offset, 256)
        out[".absmax"] = nearest(scaled, table).ravel()[: absmax.size]
        out[".nested_absmax"], out[".nested_quant_map"] = more.astype("f4"), table
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = offset
        units = more.astype("f4").astype("f8").repeat(256)[: absmax.size]
        absmax = table.astype("f8")[out[".absmax"]] * units + offset
    else:
        out[".absmax"] = absmax.astype("f4")
    text = json.dumps(state).encode()
    out[".quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    values = nf4.astype("f8")[codes] * absmax[:, None]
    return out, values.ravel()[: weight.size].reshape(weight.shape)


def rewrite(folder, nf4: np.ndarray, nested: bool) -> dict[str, np.ndarray]:
    """Turns a saved model's kernels into 4 bits; what they mean, by tensor."""
    file, meant = folder / "model.safetensors", {}
    tensors = load_file(file)
    for name in [name for name in tensors if KERNEL.fullmatch(name)]:
        parts, meant[name] = write(tensors.pop(name), nf4, nested)
        tensors |= {name + suffix: x for suffix, x in parts.items()}
    save_file(tensors, file)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return meant
