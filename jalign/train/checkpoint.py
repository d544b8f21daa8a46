"""Checkpoints: one atomic directory a step, verified when read, with fallback.

A step holds every array of a run and a JSON record with the digest of each array, so
that a run continues exactly or says why it cannot. Orbax writes in the background and
renames the finished directory into place, so a kill at any time leaves either the
whole step or nothing.
"""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jalign import sharding
from jalign.paths import files_below, fresh, located, reaching
from jalign.train.integrity import (
    Damaged,
    agreed,
    check_readable,
    first_line,
    tree_digest,
    tree_specs,
    with_keys,
    without_keys,
)
from jalign.train.step_folders import StepFolders
from jalign.train.stop import set_aside
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
_SLOW = 2.0  # seconds that a run waits for a checkpoint before it says so


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


class Checkpointer:
    """Saves and restores trees of arrays under DIRECTORY/STEP.

    Every process of a run makes one and calls the same methods in the same order.

    Args:
      directory: made when missing; left-overs of a killed run are removed. Or a URL,
        see step_folders.
      keep: how many newest steps stay on disk.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.directory = located(directory).absolute()
        self.keep = keep
        self._ocp = ocp
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._failure: Exception | None = None
        self._writing: int | None = None
        self._wait = self._orbax.wait_until_finished
        self._closed = False
        self.protected: int | None = None  # a step that stays, however old
        self._folders = StepFolders(self.directory)
        sharding.barrier("checkpointer")

    def steps(self) -> list[int]:
        """Numbers of the steps there, oldest first, whether readable or not."""
        return self._folders.steps()

    def empty(self) -> bool:
        """Whether there is no step, nor what is left of a damaged one."""
        return not self.steps() and not self._folders.damaged()

    def save(self, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts writing; returns once the arrays may be donated.

        A save that fails (a full disk) is logged at the next call, and training goes
        on with the older steps intact; `close` raises if the last one failed. So is
        one that takes longer than the steps until the next.

        Args:
          step: its number; an existing step of this number is replaced.
          tree: jax.Arrays (typed PRNG keys too), all laid out on the same devices.
          meta: JSON values; finite numbers come back exactly.
        """
        began, before = time.perf_counter(), self._writing
        self.wait()
        waited = time.perf_counter() - began
        if before is not None and waited > _SLOW:
            _log.warning(
                "waited %.0f s for the checkpoint of step %d: saving is slower than "
                "the steps between; raise --checkpoint-every",
                waited,
                before,
            )
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
            whole = args.Composite(
                state=args.StandardSave(arrays), meta=args.JsonSave(record)
            )
            write = functools.partial(self._orbax.save, args=whole, force=True)
            self._wait = self._folders.save(
                step, write, self._orbax.wait_until_finished
            )
            self._writing = step
        except Exception as error:
            self._failed(error)

    def wait(self) -> None:
        """Waits for the step being written, then removes steps beyond `keep`."""
        try:
            self._wait()
        except Exception as error:
            self._failed(error)
            return
        if self._writing is not None:
            self._failure = self._writing = None
        if sharding.is_main_process():
            for step in self.steps()[: -self.keep]:
                if step != self.protected:
                    self._folders.remove(step)

    def _failed(self, error: Exception) -> None:
        self._failure, self._writing = error, None
        self._wait = self._orbax.wait_until_finished
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

    def restore_step(self, step: int, abstract: PyTree) -> Restored:
        """A certain step, such as the best one.

        Raises: ValueError if it is damaged, or gone; as `restore`.
        """
        path = self.directory / str(step)
        try:
            return self._read(path, abstract)
        except Damaged as error:
            raise ValueError(f"checkpoint {path} is damaged ({error})") from error

    def restore(self, abstract: PyTree) -> Restored | None:
        """The newest step that is as it was written; None if there never was one.

        Steps that are damaged are renamed to STEP.corrupt once an older one has been
        read: where none can be, the reader may be at fault, and nothing is touched.

        Args:
          abstract: tree of ShapeDtypeStructs with shardings (or of arrays).

        Raises: ValueError if the arrays of a step have another structure, shape or
          dtype (another model or optimizer), or if every step is damaged; OSError or
          MemoryError where a step could not be read, whatever is in it.
        """
        restored, damaged = self._newest(lambda path: self._read(path, abstract))
        for path, error in damaged.items():
            _log.warning("checkpoint %s is damaged (%s)", path, error)
            set_aside(path, "corrupt")
        if restored is not None and damaged:
            _log.warning("falling back to step %d", restored.step)
        return restored

    def peek(self) -> dict[str, Any] | None:
        """The meta record of the newest step that has a readable one; None if nothing
        was ever saved. Raises: as `restore`."""
        return self._newest(lambda path: self._read_record(path)["meta"])[0]

    def _newest(self, read: Callable[[Path], Any]) -> tuple[Any, dict[Path, Damaged]]:
        """What read gives of the newest step that is not damaged, and the steps that
        are; None if nothing was ever saved: a run with a past does not start from
        scratch without a word."""
        damaged: dict[Path, Damaged] = {}
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                return read(path), damaged
            except Damaged as error:
                damaged[path] = error
        if self.empty():
            return None, {}
        reasons = [f"step {path.name}: {error}" for path, error in damaged.items()]
        reasons += self._folders.damaged()
        raise ValueError(
            f"{self.directory}: no checkpoint can be read; {'; '.join(reasons)}. Put a "
            "good copy back, or start anew with --no-resume (these are kept)"
        )

    def _read(self, path: Path, abstract: PyTree) -> Restored:
        record = agreed(lambda: self._read_record(path))
        arrays = jax.tree.map(_target, without_keys(abstract, shapes=True))
        _check_specs(path, record["specs"], tree_specs(arrays))

        def read():
            args = self._ocp.args
            item = args.Composite(state=args.StandardRestore(arrays))
            with self._folders.readable(path) as here:
                try:
                    return self._orbax.restore(str(here), args=item)["state"]
                except Exception as error:
                    check_readable(path, error, files_below(here))
                    raise Damaged(first_line(error)) from error

        tree = agreed(read)
        digest = tree_digest(tree)
        wrong = [
            name for name, value in record["digest"].items() if digest[name] != value
        ]
        if wrong:
            raise Damaged(f"{len(wrong)} arrays differ from their digest: {wrong[0]}")
        return Restored(record["step"], with_keys(tree, abstract), record["meta"])

    def _read_record(self, path: Path) -> dict[str, Any]:
        try:
            file = fresh(path / "meta" / "metadata")
            with reaching(file):
                text = file.read_bytes()
            record = json.loads(text.decode("utf-8"))
            seal = record.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            check_readable(path, error)
            raise Damaged(f"no readable record: {error}") from error
        if _seal(record)["sha256"] != seal:
            raise Damaged("its record differs from its checksum")
        return record


def _seal(record: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(record, sort_keys=True)
    return record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _check_specs(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(name, "absent"), wanted.get(name, "absent")
        if old != new:
            raise ValueError(
                f"{path} is of another run: {name} is {old} there and {new} here "
                "(another model or optimizer?); use another --out, or --no-resume"
            )


def _target(x) -> jax.ShapeDtypeStruct:
    place = getattr(x, "sharding", None)
    if place is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
