"""Checkpoints: one atomic directory a step, verified when read, with fallback.

A step holds every array of a run and a JSON record with the digest of each array, so
that a run continues exactly or says why it cannot. Orbax writes in the background and
renames the finished directory into place, so a kill at any time leaves either the
whole step or nothing.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jalign import sharding
from jalign.train.digest import tree_digest, tree_specs, with_keys, without_keys

PyTree = Any
_log = logging.getLogger("jalign.train")
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleting")


class Restored(NamedTuple):
    """What `Checkpointer.restore` found.

    Attributes:
      step: the number it was saved under.
      tree: the arrays, laid out as the abstract tree asked.
      meta: the JSON record that was given to `save`.
    """

    step: int
    tree: PyTree
    meta: dict[str, Any]


class Damaged(Exception):
    """A step that cannot be read back as it was written."""


class Checkpointer:
    """Saves and restores trees of arrays under DIRECTORY/STEP.

    Every process of a run makes one and calls the same methods in the same order.

    Args:
      directory: made when missing; left-overs of a killed run are removed.
      keep: how many newest steps stay on disk.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._ocp = ocp
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._failure: Exception | None = None
        self._closed = False
        if sharding.is_main_process():
            self.directory.mkdir(parents=True, exist_ok=True)
            for pattern in _LEFTOVERS:
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
        sharding.barrier("checkpointer")

    def steps(self) -> list[int]:
        """Numbers of the steps on disk, oldest first, whether readable or not."""
        names = (p.name for p in self.directory.iterdir() if p.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts writing; returns once the arrays may be donated.

        A save that fails (a full disk) is logged at the next call, and training goes
        on with the older steps intact; `close` raises if the last one failed.

        Args:
          step: its number; an existing step of this number is replaced.
          tree: jax.Arrays (typed PRNG keys too), all laid out on the same devices.
          meta: JSON values; finite numbers come back exactly.
        """
        self.wait()
        arrays = without_keys(tree)
        record = _seal(
            {
                "step": step,
                "meta": dict(meta),
                "specs": tree_specs(arrays),
                "digest": tree_digest(arrays),
            }
        )
        args = self._ocp.args
        try:
            self._orbax.save(
                self.directory / str(step),
                args=args.Composite(
                    state=args.StandardSave(arrays), meta=args.JsonSave(record)
                ),
                force=True,
            )
        except Exception as error:
            self._failed(error)

    def wait(self) -> None:
        """Waits for the step being written, then removes steps beyond `keep`."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return
        if sharding.is_main_process():
            for step in self.steps()[: -self.keep]:
                _remove(self.directory / str(step))

    def _failed(self, error: Exception) -> None:
        self._failure = error
        _log.error(
            "checkpoint not written to %s: %s; older steps are intact: %s",
            self.directory,
            error,
            self.steps(),
        )

    def close(self) -> None:
        """Waits; raises OSError if the last save failed."""
        if self._closed:
            return
        self.wait()
        self._orbax.close()
        self._closed = True
        if self._failure is not None:
            raise OSError(
                f"checkpoint not written to {self.directory}: {self._failure}"
            )

    def restore(self, abstract: PyTree) -> Restored | None:
        """The newest step that is as it was written; None if there is no step.

        A damaged step is renamed to STEP.corrupt and the one before it is taken.

        Args:
          abstract: tree of ShapeDtypeStructs with shardings (or of arrays).

        Raises: ValueError if the arrays of a step have another structure, shape or
          dtype (another model or optimizer), or if every step is damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                restored = self._read(path, abstract)
            except Damaged as error:
                problems.append(f"step {step}: {error}")
                _log.warning("checkpoint %s is damaged (%s)", path, error)
                self._quarantine(path)
                continue
            if problems:
                _log.warning("falling back to step %d", step)
            return restored
        if problems:
            raise ValueError(
                f"{self.directory}: no checkpoint can be read; " + "; ".join(problems)
            )
        return None

    def peek(self) -> dict[str, Any] | None:
        """The meta record of the newest step that has a readable one, or None."""
        for step in reversed(self.steps()):
            try:
                return self._read_record(self.directory / str(step))["meta"]
            except Damaged:
                continue
        return None

    def _read(self, path: Path, abstract: PyTree) -> Restored:
        record = _agreed(lambda: self._read_record(path))
        arrays = jax.tree.map(_target, without_keys(abstract, shapes=True))
        _check_specs(path, record["specs"], tree_specs(arrays))

        def read():
            args = self._ocp.args
            item = args.Composite(state=args.StandardRestore(arrays))
            try:
                return self._orbax.restore(path, args=item)["state"]
            except Exception as error:
                raise Damaged(_first_line(error)) from error

        tree = _agreed(read)
        digest = tree_digest(tree)
        wrong = [
            name for name, value in record["digest"].items() if digest[name] != value
        ]
        if wrong:
            raise Damaged(f"{len(wrong)} arrays differ from their digest: {wrong[0]}")
        return Restored(record["step"], with_keys(tree, abstract), record["meta"])

    def _read_record(self, path: Path) -> dict[str, Any]:
        try:
            text = (path / "meta" / "metadata").read_text(encoding="utf-8")
            record = json.loads(text)
            seal = record.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Damaged(f"no readable record: {error}") from error
        if _seal(record)["sha256"] != seal:
            raise Damaged("its record differs from its checksum")
        return record

    def _quarantine(self, path: Path) -> None:
        sharding.barrier("quarantine")
        if sharding.is_main_process():
            target, number = path.with_name(f"{path.name}.corrupt"), 1
            while target.exists():
                target = path.with_name(f"{path.name}.corrupt{number}")
                number += 1
            path.rename(target)
        sharding.barrier("quarantined")


def _seal(record: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(record, sort_keys=True)
    return record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _agreed(read: Callable[[], Any]) -> Any:
    """read() on every process; Damaged on all of them where one fails."""
    result, error = None, None
    try:
        result = read()
    except Damaged as damage:
        error = damage
    if jax.process_count() > 1:
        flags = multihost_utils.process_allgather(np.asarray(error is None))
        if error is None and not np.all(flags):
            error = Damaged("another process cannot read it")
    if error is not None:
        raise error
    return result


def _check_specs(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(name, "absent"), wanted.get(name, "absent")
        if old != new:
            raise ValueError(
                f"{path} is of another run: {name} is {old} there and {new} here "
                "(another model or optimizer?)"
            )


def _target(x) -> jax.ShapeDtypeStruct:
    place = getattr(x, "sharding", None)
    if place is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _remove(path: Path) -> None:
    """Deletes a step; renamed first, so that a kill leaves no half-deleted step."""
    doomed = path.with_name(f"{path.name}.deleting")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
