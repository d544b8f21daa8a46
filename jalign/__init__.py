"""jalign: align open LLaMA-style language models in JAX, as pure functions."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "data",
    "evaluate",
    "generate",
    "losses",
    "models",
    "plan",
    "pretrained",
    "report",
    "rewards",
    "sharding",
    "train",
    "types",
]

if TYPE_CHECKING:
    from jalign import (
        data,
        evaluate,
        generate,
        losses,
        models,
        plan,
        pretrained,
        report,
        rewards,
        sharding,
        train,
        types,
    )


def __getattr__(name: str):
    # Lazy (PEP 562), so that `import jalign` starts no backend and reads no file.
    if name in __all__ and name != "__version__":
        return importlib.import_module(f"jalign.{name}")
    raise AttributeError(f"module 'jalign' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
