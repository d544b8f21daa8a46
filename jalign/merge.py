"""`jalign merge`: one checkpoint of an adapter and its base, of several models, or of a
base and a weight delta; and that delta.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jalign import sharding
from jalign.models import averaging, merging, weight_delta
from jalign.models.hf_checkpoints import Out
from jalign.paths import located
from jalign.pretrained import Opened, check_same_vocab, open_pretrained
from jalign.settings import Checked, check, number

__all__ = ["MergeConfig", "run_merge"]

Method = Literal[
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "delta",
]
_TASKS = ("base", "weights", "scale")
# What is done -> the flags that it reads, beside those of the models, and --out.
_READ: dict[str, tuple[str, ...]] = {
    "--adapter": ("dtype",),
    "--delta": (),
    "linear": ("weights", "dtype"),
    "slerp": ("t", "dtype"),
    "task_arithmetic": (*_TASKS, "dtype"),
    "ties": (*_TASKS, "density", "dtype"),
    "dare_linear": (*_TASKS, "density", "seed", "dtype"),
    "dare_ties": (*_TASKS, "density", "seed", "dtype"),
    "delta": ("base",),
}
_OPTIONS = {flag for flags in _READ.values() for flag in flags}


@dataclass(frozen=True)
class MergeConfig(Checked):
    """One checkpoint of several: an adapter and its base, or models averaged.

    --model with its --adapter, or with a --delta; or several --models by a --method.

    Raises: ValueError naming the flags that do not go together.
    """

    out: str
    """Directory that the checkpoint goes to; none of those that are read."""
    model: str | None = None
    """The base of --adapter or --delta: a directory or a hub id; unset takes the one
    that the adapter names."""
    adapter: str | None = None
    """Merge this adapter, in PEFT's format, into `model`."""
    delta: str | None = None
    """Make of `model` the one that this weight delta was made of, the same bit for
    bit."""
    models: tuple[str, ...] = ()
    """What --method is about: directories or hub ids of models of one architecture and
    one vocabulary. Its tokenizer and dtypes are the first one's."""
    method: Method | None = None
    """linear: the mean. slerp: between two models, along the arc. The others work on
    the changes since --base. task_arithmetic: their sum. ties: the mean of the largest
    ones, of the sign that outweighs the other. dare_linear: the sum of a random part,
    scaled up. dare_ties: of that, what has the sign that outweighs. delta: the changes
    of one model, for --delta."""
    base: str | None = None
    """The model that `models` were trained from."""
    weights: tuple[float, ...] = ()
    """One for each of `models`; unset counts them alike."""
    density: float | None = number(None, "> 0", "<= 1")
    """Share of each tensor's changes that is kept; unset takes 0.2 for ties, and 0.1
    for dare, whose p is 0.9."""
    scale: float | None = None
    """Factor of the merged changes, lambda; unset takes 1."""
    t: float | None = number(None, ">= 0", "<= 1")
    """Of slerp: 0 is the first model, 1 the second; unset takes 0.5."""
    seed: int | None = number(None, ">= 0", "< 4294967296")
    """Of the changes that dare drops; unset takes 0."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; unset keeps each tensor's own."""

    def __post_init__(self):
        super().__post_init__()
        kinds = {
            "--adapter": self.adapter,
            "--delta": self.delta,
            "--models": self.models,
        }
        given = [flag for flag, value in kinds.items() if value]
        wanted = ", ".join(kinds)
        check(
            len(given) == 1, f"give one of {wanted}; got {', '.join(given) or 'none'}"
        )
        self._check_models(given[0])
        what = self.kind if given[0] != "--models" else f"--method {self.kind}"
        for flag in sorted(_OPTIONS - {*_READ[self.kind]}):
            unread = getattr(self, flag) not in (None, ())
            check(not unread, f"--{flag} says nothing with {what}; leave it out")
        if "base" in _READ[self.kind]:
            check(bool(self.base), f"{what} needs --base, which they were trained from")
        numbers = (*self.weights, self.scale or 0.0)
        check(all(map(math.isfinite, numbers)), "--weights and --scale must be finite")
        many = len(self.models)
        if self.weights:
            counts = f"{len(self.weights)} --weights for {many} --models"
            check(len(self.weights) == many, f"{counts}; give one for each")

    def _check_models(self, given: str) -> None:
        if given == "--models":
            check(self.method is not None, "--models needs a --method, such as linear")
            check(self.model is None, "give --models or --model, not both")
            count = len(self.models)
            if self.method in ("slerp", "delta"):
                most = {"slerp": 2, "delta": 1}[self.method]
                text = f"--method {self.method} takes {most} of --models, got {count}"
                check(count == most, text)
        else:
            check(self.method is None, f"--method is of --models, not of {given}")
            check(bool(self.model or self.adapter), f"{given} needs --model, its base")

    @property
    def kind(self) -> str:
        """A key of _READ."""
        return "--adapter" if self.adapter else self.method or "--delta"


def run_merge(config: MergeConfig) -> dict[str, Any]:
    """Makes the checkpoint; returns what was written, for the screen."""
    result: dict[str, Any] = {"wrote": config.out}
    if sharding.is_main_process():
        with _on_host():
            result |= _merge(config)
    sharding.barrier(f"merge {config.out}")
    return result


def _on_host() -> contextlib.AbstractContextManager:
    """The work is in reading and writing: an accelerator would not help, and the memory
    of the host is larger."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def _merge(config: MergeConfig) -> dict[str, Any]:
    if config.adapter:
        return _merge_adapter(config)
    if config.delta:
        return _apply_delta(config)
    opened = [_whole(path) for path in config.models]
    base = _whole(config.base) if config.base else None
    folders = [each.folder for each in opened]
    out = _out(config, opened[0], *folders, *([base.folder] if base else []))
    for path, each in zip(config.models[1:], opened[1:], strict=True):
        _check_vocab(opened[0], each, f"{config.models[0]} and {path}")
    if base:
        _check_vocab(opened[0], base, f"{config.models[0]} and --base")
    if config.method == "delta":
        assert base is not None
        digest = weight_delta.make_delta(folders[0], base.folder, out)
        return {"digest of the target": digest}
    start = base and base.folder
    how: Any = {"base": start, "dtype": config.dtype}
    return {"tensors": merging.average(folders, _combine(config), out, **how)}


def _merge_adapter(config: MergeConfig) -> dict[str, Any]:
    assert config.adapter is not None
    opened = open_pretrained(config.adapter, config.model)
    if opened.adapter is None:
        raise ValueError(f"--adapter {config.adapter} is a whole model, no adapter")
    folders = opened.folder, opened.adapter
    out = _out(config, opened, *folders)
    return {"tensors": merging.merge_adapter(*folders, out, config.dtype)}


def _apply_delta(config: MergeConfig) -> dict[str, Any]:
    assert config.model is not None and config.delta is not None
    base, delta = _whole(config.model), open_pretrained(config.delta)
    _check_vocab(delta, base, "--delta and --model")
    folders = base.folder, delta.folder
    digest = weight_delta.apply_delta(*folders, _out(config, delta, *folders))
    return {"digest of the weights": digest}


def _whole(path: str) -> Opened:
    """Of a model and no adapter."""
    opened = open_pretrained(path)
    if opened.adapter is not None:
        raise ValueError(
            f"{path} is an adapter: make a model of it first, jalign merge --model "
            f"{opened.base} --adapter {path} --out DIR"
        )
    return opened


def _out(config: MergeConfig, like: Opened, *inputs: Path) -> Out:
    """Where it goes, with the config and tokenizer of `like`."""
    folder = located(config.out).expanduser()
    if folder.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"--out {config.out} is one of the inputs; give a new folder")
    return Out(folder, like.config, like.tokenizer)


def _check_vocab(first: Opened, second: Opened, names: str) -> None:
    check_same_vocab(first, second, names, "the same row is of another token")


def _combine(config: MergeConfig) -> Callable[..., jax.Array]:
    """(name, tensors, the base's tensor) -> merged; see merging.average."""
    method = getattr(averaging, config.kind)
    read, needs = _READ[config.kind], {"base", "seed", "dtype"}
    options = {flag: getattr(config, flag) for flag in read if flag not in needs}
    options = {flag: x for flag, x in options.items() if x not in (None, ())}
    merge = jax.jit(functools.partial(method, **options))
    key = jax.random.key(config.seed or 0)

    def combine(name: str, tensors: list, base) -> jax.Array:
        arrays = [tensors] if base is None else [tensors, base]
        if "seed" not in read:
            return merge(*arrays)
        # By the name, so that the order of the files does not matter.
        return merge(*arrays, key=jax.random.fold_in(key, zlib.crc32(name.encode())))

    # Weights that do not fit are said before anything is written.
    shapes = [np.zeros(1)] * len(config.models), np.zeros(1) if config.base else None
    jax.eval_shape(functools.partial(combine, "", *shapes))
    return combine
