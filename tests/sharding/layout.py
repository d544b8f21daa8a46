"""The whole parameter layout as shapes: every optional leaf present."""

import jax
import jax.numpy as jnp


def shapes(V=16, D=8, F=24, L=2, N=4, K=2, H=6):
    """Nested dict of float32 ShapeDtypeStructs."""
    norm, head_norm = {"scale": (L, D)}, {"scale": (L, H)}
    attention = {
        "q": {"kernel": (L, D, N, H), "bias": (L, N, H)},
        "k": {"kernel": (L, D, K, H), "bias": (L, K, H)},
        "v": {"kernel": (L, D, K, H), "bias": (L, K, H)},
        "o": {"kernel": (L, N, H, D)},
        "q_norm": head_norm,
        "k_norm": head_norm,
    }
    mlp = {
        "gate": {"kernel": (L, D, F)},
        "up": {"kernel": (L, D, F)},
        "down": {"kernel": (L, F, D)},
    }
    tree = {
        "embed": {"embedding": (V, D)},
        "layers": {
            "attention_norm": norm,
            "attention": attention,
            "mlp_norm": norm,
            "mlp": mlp,
        },
        "norm": {"scale": (D,)},
        "unembed": {"kernel": (D, V)},
        "score": {"kernel": (D, 1)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def flat(tree):
    """{"a/b/c": leaf}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
