"""What every recipe does around its loop: the mesh, OUT, its lock, its checkpoints,
what it depends on, and its end."""

import contextlib
import hashlib
import importlib
import logging
import math
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jalign import sharding
from jalign.data.templates import fixed_clock
from jalign.paths import located, make_folder
from jalign.settings import as_text
from jalign.sharding import agreement
from jalign.sharding.context import length_multiple
from jalign.train.checkpoint import Checkpointer, Restored
from jalign.train.evaluations import NO_CALLBACKS, Callbacks, Evaluations
from jalign.train.inputs import HELD_OUT, Inputs, changes
from jalign.train.lock import lock_directory
from jalign.train.stop import StopSignal, set_aside
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")

# Of what is stored with a checkpoint; 1 had no inputs, 2 not `jalign reward`'s options,
# 3 no adapters.
RECORD_VERSION = 4
# Fields that a continued run may have changed: they do not change the steps taken.
MAY_CHANGE = frozenset(
    {"out", "eval_data", "eval_split", "steps", "epochs", "checkpoint_every", "resume"}
    | {"eval_every", "patience", "eval_reward"}
    | {"mesh", "remat", "save_critic", "reward_timeout", "reschedule"}
)
# Paths: what they hold is compared (inputs.py), and not where it lies.
SOURCES = frozenset({"model", "base", "data", "reward"})


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


class Run(NamedTuple):
    """A run's settings, and its directory, opened.

    Attributes:
      config: its config.
      kind: of its recipe, for example "sft".
      callbacks: who looks on.
      clock: where its time goes.
      out: the directory.
      mesh: None on a single device.
      checkpointer: of out/checkpoints.
      meta: to store with every checkpoint: the settings that may not change, the
        inputs once `identify` has them, and the clock of chat templates.
      stop: whether the run was asked to stop.
      previous: the meta of the newest checkpoint, or None.
    """

    config: Any
    kind: str
    callbacks: Callbacks
    clock: Clock
    out: Path
    mesh: Mesh | None
    checkpointer: Checkpointer
    meta: dict[str, Any]
    stop: StopSignal
    previous: dict[str, Any] | None


def make_run_mesh(spec: str | None) -> Mesh | None:
    """The mesh of a --mesh flag: all devices on fsdp by default, None for one device.

    A mesh that names fewer devices than there are takes the first ones, and says so.

    Raises: ValueError as sharding.make_mesh.
    """
    sizes = sharding.parse_mesh(spec)
    devices = jax.devices()
    wanted = math.prod(sizes.values())
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


@contextlib.contextmanager
def open_run(
    config: Any, kind: str, callbacks: Callbacks = NO_CALLBACKS
) -> Iterator[Run]:
    """Locks OUT, refuses another run's checkpoints, and closes everything at the end.

    Inside, SIGTERM and SIGINT raise Preempted (see StopSignal), and the clock of chat
    templates stands where it stood at the first start.

    Args:
      config: a config dataclass with `out`, `mesh` and `resume`.
      kind: the recipe's name, for example "sft"; part of what may not change.
      callbacks: for the Run.

    Raises: ValueError if OUT has checkpoints of other settings, another run is working
      in it, or the mesh does not divide max_length; OSError if OUT cannot be written.
    """
    record = {"kind": kind} | fixed_settings(config)
    everything = _kept(as_text(config), SOURCES | {"out", "eval_data"})
    code = _code() if jax.process_count() > 1 else {}
    sharding.agree("code or settings", code | {"command": kind} | everything)
    with agreement.together(f"opening {config.out}"):
        make_folder(out := located(config.out))
    with StopSignal() as stop, lock_directory(out):
        mesh = make_run_mesh(config.mesh)
        length_multiple(mesh, config.max_length)
        directory = out / "checkpoints"
        checkpointer = Checkpointer(directory)
        if not config.resume and not checkpointer.empty():
            checkpointer.close()
            target = set_aside(directory, "old", first=1)
            _log.warning("starting anew: the old checkpoints are now in %s", target)
            checkpointer = Checkpointer(directory)
        previous = checkpointer.peek()
        _check_same_run(out, previous, record, config)
        clock = (previous or {}).get("clock") or _agreed_now()
        meta = {"version": RECORD_VERSION, "config": record, "clock": clock}
        try:
            with fixed_clock(datetime.fromisoformat(clock)):
                given = config, kind, callbacks, Clock()
                yield Run(*given, out, mesh, checkpointer, meta, stop, previous)
        finally:
            stop.hold()
            checkpointer.close()


def identify(
    run: Run, inputs: Inputs, held_out: str, *, reschedule: bool = False
) -> Run:
    """The run with its inputs in what its checkpoints store.

    Args:
      run: opened.
      inputs: of inputs.py: what the run depends on beside its settings.
      held_out: digest of the rows that are measured only, which may change.
      reschedule: whether the number of steps may have changed.

    Raises: ValueError naming what is not as it was in the run's checkpoints, or not
      the same on every process.
    """
    sharding.agree("the data or the model", inputs | {HELD_OUT: held_out})
    if run.previous is not None:
        old = run.previous.get("inputs")
        _refuse(run.out, changes(old, inputs, reschedule=reschedule))
    return run._replace(meta=run.meta | {"inputs": inputs})


def restore_state(run: Run, abstract: PyTree) -> Restored | None:
    """The newest good checkpoint of a run, or None; says which."""
    restored = run.checkpointer.restore(abstract)
    if restored is not None:
        _log.info("continuing from step %d of %s", restored.step, run.out)
    return restored


def kept_tree(
    run: Run, evaluations: Evaluations, tree: PyTree, last: int
) -> tuple[PyTree, int]:
    """What is exported and its step: the checkpoint that keep_best chose, laid out as
    the tree, or else the tree itself, which is of the last step."""
    kept = evaluations.kept
    if kept is None or kept == last:
        return tree, last
    _log.info("OUT/model is of step %d, the best of %d", kept, last)
    return run.checkpointer.restore_step(kept, tree).tree, kept


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings of a config dataclass that a continued run must not change."""
    return _kept(as_text(config), MAY_CHANGE | SOURCES)


def _kept(value: Any, without: frozenset[str]) -> Any:
    if isinstance(value, dict):
        # `reward` is a source, and of `jalign reward` a group of options.
        chosen = {k: v for k, v in value.items() if k not in without or type(v) is dict}
        return {k: _kept(v, without) for k, v in chosen.items()}
    return list(value) if isinstance(value, tuple) else value


def _code() -> dict[str, str]:
    """What the program is made of: versions, and the digest of jalign's files."""
    sha = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        sha.update(file.read_bytes())
    version = importlib.import_module("jalign").__version__
    versions = {"jalign": version, "jax": jax.__version__}
    return versions | {"the files of jalign": sha.hexdigest()[:16]}


def _agreed_now() -> str:
    """Process 0's time, to the microsecond, in ISO format."""
    now = datetime.now().isoformat(timespec="microseconds")
    if jax.process_count() > 1:
        text = np.frombuffer(now.encode(), np.uint8)
        now = np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().decode()
    return now


def _check_same_run(
    out: Path, meta: dict[str, Any] | None, record: dict, config: Any
) -> None:
    if meta is None:
        return
    old, new = _flat(meta.get("config") or {}), _flat(record)
    names = sorted(old.keys() | new.keys())
    if meta.get("version") != RECORD_VERSION:
        # Paths stand for what they hold there; fields may be called otherwise.
        new |= {k: v for k, v in as_text(config).items() if k in SOURCES}
        names = sorted(old.keys() & new.keys())
    _refuse(
        out,
        [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in names
            if old.get(name) != new.get(name)
        ],
    )


def _refuse(out: Path, changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"{out} holds checkpoints of another run ({'; '.join(changed)}): undo the "
            "change to continue it, use another --out, or start anew with --no-resume "
            "(the old checkpoints are kept beside the new)"
        )


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in record.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
