"""Random attention inputs: packed rows with padding, and their NumPy answer."""

import numpy as np


def packed_rows(lengths, total):
    """segment_ids and positions int32 [B, T] of documents of these lengths."""
    ids = np.zeros((len(lengths), total), np.int32)
    positions = np.zeros_like(ids)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes, 1):
            ids[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return ids, positions


def random_qkv(shape, kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    B, T, N, H = shape
    q, k, v = rng.normal(size=shape), *rng.normal(size=(2, B, T, kv_heads, H))
    return tuple(x.astype(np.float32) for x in (q, k, v))


def oracle(q, k, v, ids, positions, window=None):
    """float64 loops over rows, queries and heads."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out, groups = np.zeros_like(q), N // k.shape[2]
    for b in range(B):
        for t in range(T):
            distance = positions[b, t] - positions[b]
            seen = (ids[b] == ids[b, t]) & (distance >= 0)
            if window is not None:
                seen &= distance < window
            for n in range(N):
                s = k[b, seen, n // groups] @ q[b, t, n] / np.sqrt(H)
                w = np.exp(s - s.max())
                out[b, t, n] = w @ v[b, seen, n // groups] / w.sum()
    return out
