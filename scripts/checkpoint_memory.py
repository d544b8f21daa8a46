"""Host memory of loading and saving a checkpoint of 1.3 GB, in 1 and 2 processes.

    PYTHONPATH=. python scripts/checkpoint_memory.py [--processes 1,2] [--layers 16]

Every process has four CPU devices, and all of them are one mesh, fsdp. A table says, of
the process that took most: its peak resident memory less what it had before (file pages
counted), split at the moment of the peak into anonymous and file pages; its own shards;
the largest stacked leaf, and one layer of it; what it read and wrote, by the kernel's
count; seconds; and the peak over the mark, 1.2 x own shards + one leaf. Ends with 1
where that is above 1. A CPU's devices are the host's memory: a leaf that is gathered to
four devices counts four times.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

from jalign import sharding
from jalign.models import Model, ModelConfig, load, save
from tests.sharding.processes import free_port

DEVICES = 4
COLUMNS = ("peak", "anon", "file", "shards", "leaf", "layer", "read", "wrote")


def resident() -> dict[str, int]:
    """Bytes of this process's pages: anonymous ones, and those of files."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    kinds = {"anon": ("RssAnon",), "file": ("RssFile", "RssShmem")}
    return {k: sum(int(values[v].split()[0]) << 10 for v in kinds[k]) for k in kinds}


def moved() -> dict[str, int]:
    """Bytes that this process has read and written by system calls."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    values = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return {"read": values["rchar"], "wrote": values["wchar"]}


class Measured:
    """A context: the peak of resident memory inside, and what was read and written."""

    def __init__(self, before: dict[str, int]):
        self.before, self.peak, self.over = before, before, threading.Event()

    def __enter__(self) -> "Measured":
        self.began, self.io = time.perf_counter(), moved()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.001):
            self.peak = max(self.peak, resident(), key=lambda now: sum(now.values()))

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.began

    def row(self) -> dict[str, float]:
        more = {key: self.peak[key] - self.before[key] for key in self.before}
        io = {key: value - self.io[key] for key, value in moved().items()}
        return {"peak": sum(more.values()), **more, **io, "seconds": self.seconds}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Loads and saves; in each process."""
    mesh = sharding.make_mesh()
    # Whatever the first collective and the first compilation take, they take before.
    sharding.gather(jax.jit(lambda x: x + 1)(jax.numpy.zeros(DEVICES)))
    sharding.barrier("ready")
    before, rows = resident(), {}
    with Measured(before) as measured:
        model, params = load(folder / "model", mesh=mesh)
    rows["load"] = measured.row()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what glibc keeps of the loading, and training uses
    with Measured(before) as measured:
        save(folder / "again", model, params, max_shard_size=400_000_000)
    rows["save"] = measured.row()
    leaves = jax.tree.leaves(params)
    sizes = {
        "shards": sum(s.data.nbytes for x in leaves for s in x.addressable_shards),
        "leaf": max(x.nbytes for x in leaves),
        "layer": max(x.nbytes // (x.shape[0] if x.ndim > 2 else 1) for x in leaves),
    }
    return {name: row | sizes for name, row in rows.items()}


def run(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """name -> the row of the process that took most."""
    port, outs = str(free_port()), [folder / f"{i}.json" for i in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), port, str(count), str(i)]
        )
        for i in range(count)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"processes ended with {codes}")
    all_rows = [json.loads(out.read_text("utf-8")) for out in outs]
    return {
        name: max((rows[name] for rows in all_rows), key=lambda row: row["peak"])
        for name in all_rows[0]
    }


def child(folder: str, port: str, count: str, index: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if count != "1":
        sharding.initialize(f"127.0.0.1:{port}", int(count), int(index))
    rows = measure(Path(folder))
    Path(folder, f"{index}.json").write_text(json.dumps(rows), "utf-8")


def make(folder: Path, layers: int) -> None:
    """A random checkpoint: 16 layers are 1.3 GB, of which a leaf is 0.27."""
    config = ModelConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
    )
    model = Model(config)
    save(folder, model, model.init(jax.random.key(0)), max_shard_size=400_000_000)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--layers", type=int, default=16)
    options, worst = parser.parse_args(), 0.0
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as name:
        make(Path(name, "model"), options.layers)
        print("MB".ljust(8), *(c.rjust(7) for c in COLUMNS), "seconds  peak / mark")
        for count in map(int, options.processes.split(",")):
            for what, row in run(Path(name), count).items():
                ratio = row["peak"] / (1.2 * row["shards"] + row["leaf"])
                worst = max(worst, ratio)
                numbers = (f"{row[c] / 1e6:7.0f}" for c in COLUMNS)
                end = f"{row['seconds']:7.1f}  {ratio:11.2f}"
                print(f"{what} {count}".ljust(8), *numbers, end, flush=True)
    return int(worst > 1)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(child(*sys.argv[1:]) if len(sys.argv) == 5 else main())
