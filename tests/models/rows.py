"""Random attention inputs: packed rows with padding, and their NumPy answer."""

import numpy as np

from jalign.models.scores import PLAIN_SCORES, Scores

SLOPES = (0.25, 0.0625, 0.5, 0.125)
# What families make of q k, for four heads.
SCORES = {
    "scale": Scores(scale=0.7),
    "softcap": Scores(softcap=0.8),
    "alibi": Scores(slopes=SLOPES),
    "all": Scores(0.7, 0.8, SLOPES),
}


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


def oracle(q, k, v, ids, positions, window=None, scores=PLAIN_SCORES):
    """float64 loops over rows, queries and heads."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out, groups = np.zeros_like(q), N // k.shape[2]
    scale = H**-0.5 if scores.scale is None else scores.scale
    for b in range(B):
        for t in range(T):
            distance = positions[b, t] - positions[b]
            seen = (ids[b] == ids[b, t]) & (distance >= 0)
            if window is not None:
                seen &= distance < window
            for n in range(N):
                s = k[b, seen, n // groups] @ q[b, t, n] * scale
                if scores.slopes:
                    per_token = scores.slopes[n] * (scale if scores.rounded else 1)
                    s = s - per_token * distance[seen]
                if scores.softcap is not None:
                    s = scores.softcap * np.tanh(s / scores.softcap)
                w = np.exp(s - s.max())
                out[b, t, n] = w @ v[b, seen, n // groups] / w.sum()
    return out
