"""What every recipe does around its loop: the mesh, OUT, its lock, its checkpoints."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jalign import sharding
from jalign.train.checkpoint import Checkpointer, Restored

PyTree = Any
_log = logging.getLogger("jalign.train")

# Fields that a continued run may have changed: they do not change the steps taken.
MAY_CHANGE = frozenset(
    {"out", "eval_data", "eval_split", "steps", "epochs", "checkpoint_every", "resume"}
    | {"mesh", "remat", "save_critic", "reward_timeout"}
)


class Run(NamedTuple):
    """A run's directory, opened.

    Attributes:
      out: the directory.
      mesh: None on a single device.
      checkpointer: of out/checkpoints.
      meta: to store with every checkpoint: the settings that may not change.
    """

    out: Path
    mesh: Mesh | None
    checkpointer: Checkpointer
    meta: dict[str, Any]


def make_run_mesh(spec: str | None) -> Mesh | None:
    """The mesh of a --mesh flag: all devices on fsdp by default, None for one device.

    A mesh that names fewer devices than there are takes the first ones, and says so.

    Raises: ValueError as sharding.make_mesh.
    """
    sizes = sharding.parse_mesh(spec)
    devices = jax.devices()
    wanted = 1
    for size in sizes.values():
        wanted *= size
    # Only "fsdp=..." fixes the number of devices: unnamed, fsdp takes the rest.
    if sizes.get("fsdp", -1) > 0 and 0 < wanted < len(devices):
        if jax.process_count() > 1:
            raise ValueError(
                f"mesh {spec!r} has {wanted} devices, the processes have {len(devices)}"
            )
        left = len(devices) - wanted
        _log.warning("mesh %r leaves %d of %d devices idle", spec, left, len(devices))
        devices = devices[:wanted]
    # Made for one device, too: a size that is not there is then refused.
    mesh = sharding.make_mesh(**sizes, devices=devices)
    return mesh if mesh.size > 1 else None


class Clock:
    """Seconds of each part of a run, for the report: `seconds`, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under this name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@contextlib.contextmanager
def open_run(config: Any, kind: str) -> Iterator[Run]:
    """Locks OUT, refuses another run's checkpoints, and closes everything at the end.

    Args:
      config: a config dataclass with `out`, `mesh` and `resume`.
      kind: the recipe's name, for example "sft"; part of what may not change.

    Raises: ValueError if OUT has checkpoints of other settings, or another run is
      working in it; OSError if OUT cannot be written.
    """
    out = Path(config.out)
    record = {"kind": kind} | fixed_settings(config)
    sharding.agree("settings", json.dumps(record, sort_keys=True))
    out.mkdir(parents=True, exist_ok=True)
    with lock_directory(out):
        mesh = make_run_mesh(config.mesh)
        directory = out / "checkpoints"
        checkpointer = Checkpointer(directory)
        _check_same_run(out, checkpointer.peek(), record)
        if not config.resume and checkpointer.steps():
            checkpointer.close()
            _set_aside(directory)
            checkpointer = Checkpointer(directory)
        try:
            meta = {"config": record, "config_hash": config_hash(record)}
            yield Run(out, mesh, checkpointer, meta)
        finally:
            checkpointer.close()


def restore_state(run: Run, abstract: PyTree) -> Restored | None:
    """The newest good checkpoint of a run, or None; says which."""
    restored = run.checkpointer.restore(abstract)
    if restored is not None:
        _log.info("continuing from step %d of %s", restored.step, run.out)
    return restored


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings of a config dataclass that a continued run must not change."""

    def keep(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: keep(v) for k, v in value.items() if k not in MAY_CHANGE}
        return list(value) if isinstance(value, tuple) else value

    return keep(dataclasses.asdict(config))


def config_hash(record: dict[str, Any]) -> str:
    """16 hex digits of a settings record."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_same_run(out: Path, meta: dict[str, Any] | None, record: dict) -> None:
    if meta is None or meta.get("config") == record:
        return
    old, new = _flat(meta.get("config") or {}), _flat(record)
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    raise ValueError(
        f"{out} holds checkpoints of another run ({'; '.join(changed)}): use the same "
        "settings to continue it, or another --out"
    )


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in record.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _set_aside(directory: Path) -> None:
    """--no-resume: nothing is deleted, the old checkpoints get another name."""
    sharding.barrier("set aside")
    if sharding.is_main_process():
        number = 1
        while (target := directory.with_name(f"checkpoints.old{number}")).exists():
            number += 1
        directory.rename(target)
        _log.warning("starting anew: the old checkpoints are now in %s", target)
    sharding.barrier("was set aside")


@contextlib.contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Holds OUT/.lock, which the system releases however the process ends.

    Raises: ValueError naming the other process if it is held.
    """
    if not sharding.is_main_process():
        yield
        return
    with open(out / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{out}: another run is working here ({file.read().strip()}); "
                "wait for it, or use another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
