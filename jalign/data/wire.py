"""What is made of rows, as bytes for other processes: flat arrays, no Python objects.

A result is a RowError, or a tuple that holds, the same in all results, texts, ints and
arrays [T] of one dtype.
"""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jalign.data.rows import RowError, is_good


def to_bytes(results: Sequence[Any]) -> memoryview:
    """The results as the bytes of an .npz file, not compressed.

    Each column of the tuples is one array: ints int64 [n]; arrays, and texts in UTF-8,
    behind each other, with their lengths int64 [n].
    """
    bad = [(i, x.field, x.reason) for i, x in enumerate(results) if not is_good(x)]
    columns = list(zip(*filter(is_good, results), strict=True))
    kinds = [type(column[0]).__name__ for column in columns]
    about = json.dumps({"size": len(results), "bad": bad, "kinds": kinds})
    arrays: dict[str, Any] = {"about": np.frombuffer(about.encode(), np.uint8)}
    for i, column in enumerate(columns):
        if kinds[i] == "int":
            arrays[f"flat{i}"] = np.array(column, np.int64)
            continue
        parts = [_array(part) for part in column]
        arrays[f"flat{i}"] = np.concatenate(parts)
        arrays[f"lengths{i}"] = np.array(list(map(len, parts)), np.int64)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getbuffer()


def _array(part: str | np.ndarray) -> np.ndarray:
    if isinstance(part, str):
        return np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)
    return part


def from_bytes(data: Any) -> list[Any]:
    """The inverse of `to_bytes`; arrays are views of the flat ones."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes())
    results: list[Any] = [None] * about["size"]
    for i, field, reason in about["bad"]:
        results[i] = RowError(field, reason)
    good = [i for i, result in enumerate(results) if result is None]
    columns = [_column(arrays, i, kind) for i, kind in enumerate(about["kinds"])]
    for i, result in zip(good, zip(*columns, strict=True), strict=True):
        results[i] = result
    return results


def _column(arrays: dict[str, np.ndarray], i: int, kind: str) -> list[Any]:
    flat = arrays[f"flat{i}"]
    if kind == "int":
        return flat.tolist()
    ends = np.cumsum(arrays[f"lengths{i}"]).tolist()
    parts = [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    if kind == "str":
        return [part.tobytes().decode("utf-8", "surrogatepass") for part in parts]
    return parts
