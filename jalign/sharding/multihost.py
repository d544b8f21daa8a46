"""Several processes as one: start, global batches, gathering.

Every function also works in a single process, where most do nothing, so that one
program serves a laptop and a pod. Each is collective: every process calls it.
"""

import logging
import os
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jalign.sharding import watchdog
from jalign.sharding.blocks import PIECE_BYTES, fetch
from jalign.sharding.partition import batch_parts, batch_sharding

PyTree = Any
_log = logging.getLogger("jalign.sharding")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
) -> None:
    """Joins the processes of this run; call it before anything else touches jax.

    With no argument the cluster is detected (TPU pod, SLURM, Open MPI); where there
    is none, or with num_processes=1, nothing happens. A second call does nothing.
    Where there is one, the process joins it or fails: it never goes on alone.
    Afterwards SIGTERM no longer ends the process: poll `preempted`. When a process
    dies or stops jax ends the others, with SIGABRT.

    Args:
      coordinator: "HOST:PORT" of process 0, the same on every process.
      num_processes: how many processes take part.
      process_id: 0 .. num_processes - 1, different on every process.
      heartbeat_timeout: seconds until a process that no longer answers is taken for
        dead, the same on every process.

    Raises: ValueError where only some of the three are given or they do not fit;
      ConnectionError where the others could not be joined.
    """
    global _heartbeat_timeout
    given = (coordinator, num_processes, process_id)
    if jax.distributed.is_initialized() or given[:2] == (None, 1):
        return
    detect = all(value is None for value in given)
    if not detect:
        _check_arguments(coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=heartbeat_timeout)
    except Exception as error:  # of the network, the runtime, or a broken environment
        launched = _processes_launched()
        if detect and launched <= 1 and any(x in str(error) for x in _ALONE):
            _log.debug("a single process: %s", error)
            return
        raise ConnectionError(
            f"this process is one of {num_processes or max(launched, 2)} or more and "
            f"cannot join the others: {type(error).__name__}: {error}. Give "
            "coordinator, num_processes and process_id, or num_processes=1 to run alone"
        ) from error
    _heartbeat_timeout = heartbeat_timeout
    _log.info("process %d of %d", jax.process_index(), jax.process_count())


# What jax says without a cluster, and in a notebook that has used jax before.
_ALONE = ("coordinator_address should be defined", "must be called before")


def _processes_launched() -> int:
    """How many processes srun, mpirun or a TPU's pod says to have started, or 1.

    Apart from jax's own detection, which does not know Open MPI 5 and is not reached
    once jax has been used. A batch script of SLURM without srun is one process.
    """
    env = os.environ
    counts = [env.get("OMPI_COMM_WORLD_SIZE"), env.get("PMI_SIZE")]
    counts += [env.get("SLURM_NTASKS")] if "SLURM_STEP_NODELIST" in env else []
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max([len(hosts), *(int(n) for n in counts if n and n.isdecimal())])


def _check_arguments(coordinator, num_processes, process_id) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "coordinator, num_processes and process_id belong together: got "
            f"{coordinator!r}, {num_processes!r}, {process_id!r}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator {coordinator!r} is not HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id {process_id} is not in 0 .. {num_processes - 1}")


_heartbeat_timeout: int | None = None  # seconds, once `initialize` has joined
_LATER = 5.0  # seconds that jax may take to notice that a heartbeat is missing


def leave(code: int) -> None:
    """Makes a process that has failed end in time, with this exit code.

    At its end jax waits five minutes for the others, and they, where this process
    failed alone, wait for it in their computation. So it leaves a little more than
    heartbeat_timeout after its last line, whether they have come or not, and its
    heartbeat with it. Where its error was that another one is dead, jax is first, with
    SIGABRT. Does nothing where `initialize` joined nothing.
    """
    seconds = _heartbeat_timeout
    if seconds is None:
        return

    def end():
        threading.main_thread().join()
        time.sleep(seconds + _LATER)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes (process 0)."""
    return jax.process_index() == 0


def process_slice(mesh: Mesh | None = None) -> tuple[int, int]:
    """Which part of every global batch this process loads: (index, count).

    Without a mesh (process_index, process_count). With one, processes that hold the
    same rows (a tensor or context axis across hosts) share an index, so pass the mesh
    wherever rows are loaded for put_batch.

    Raises: ValueError where the rows of processes overlap only in part.
    """
    if mesh is None:
        return jax.process_index(), jax.process_count()
    num_blocks = batch_parts(mesh)
    blocks: dict[int, set[int]] = {}
    indices = batch_sharding(mesh).devices_indices_map((num_blocks,))
    for device, (block,) in indices.items():
        start = block.start or 0
        blocks.setdefault(device.process_index, set()).add(start)
    groups = sorted({tuple(sorted(rows)) for rows in blocks.values()})
    if sum(len(group) for group in groups) != num_blocks:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives processes rows that overlap in part; keep "
            "context*tensor inside a host, or make it a multiple of a host's devices"
        )
    if jax.process_index() not in blocks:
        return 0, len(groups)  # a mesh for another machine, as `jalign plan` makes
    return groups.index(tuple(sorted(blocks[jax.process_index()]))), len(groups)


def put_batch(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """This process's rows -> global arrays, cut over the data and fsdp axes.

    Whole in time on a context axis too: the model cuts what is wide, see context.py.

    Args:
      batch: tree of numpy arrays whose axis 0 has this process's rows, the same
        number on every process: rows [i*n, (i+1)*n) of the global batch, where
        (i, _) = process_slice(mesh).
      mesh: None puts them on the default device.

    Returns: the same tree of jax.Array; axis 0 has the rows of all processes.
    Raises: ValueError naming the array when its rows do not divide over the mesh.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    sharding = batch_sharding(mesh)
    _, count = process_slice(mesh)
    ways = batch_parts(mesh) // count

    def put(path, rows):
        rows = np.asarray(rows)
        if rows.ndim == 0 or rows.shape[0] % ways:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {rows.shape}: each of "
                f"{count} processes must give a multiple of {ways} rows, since mesh "
                f"{dict(mesh.shape)} cuts rows over data*fsdp"
            )
        shape = (rows.shape[0] * count, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    placed = jax.tree_util.tree_map_with_path(put, batch)
    watchdog.alive(computed=False)
    return placed


def gather(tree: PyTree) -> PyTree:
    """Whole arrays as numpy on every process, however they are sharded.

    Typed PRNG keys come back as their uint32 key data.
    """

    def whole(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if x.nbytes > PIECE_BYTES:  # not whole on every device
                fetch(x, (), out := np.empty(x.shape, x.dtype))
                return out
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    found = jax.tree.map(whole, tree)
    watchdog.alive()
    return found


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def preempted(step: int) -> bool:
    """True on all processes at the same step, once one of them has had a SIGTERM.

    Call it with every step, then save and leave. Always False where `initialize`
    joined nothing: such a process handles SIGTERM itself. Do not install a SIGTERM
    handler where it did, since that hides the signal from jax.
    """
    if not jax.distributed.is_initialized():
        return False
    return multihost_utils.reached_preemption_sync_point(step)
