"""Runs one Python function in several jax processes on this machine (gloo)."""

import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# gloo writes to stdout, so results come back through a file.
_SCRIPT = """
import json
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
from jalign import sharding
sharding.initialize("127.0.0.1:{port}", {count}, int(sys.argv[1]))

{source}
result = {name}()
with open(sys.argv[2], "w") as file:
    json.dump(result, file)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(body, *, count=2, devices=4, timeout=240) -> list:
    """Runs body's source in `count` processes; returns what each one returned.

    Args:
      body: a function of no arguments whose result is JSON; it imports what it needs,
        but for `jax` and `sharding`.
      count: processes.
      devices: virtual CPU devices of each.
    """
    script = _SCRIPT.format(
        devices=devices,
        port=free_port(),
        count=count,
        source=inspect.getsource(body),
        name=body.__name__,
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.json") for index in range(count)]
        running = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(index), str(file)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                cwd=ROOT,
            )
            for index, file in enumerate(files)
        ]
        try:
            errors = [process.communicate(timeout=timeout)[1] for process in running]
        finally:
            for process in running:
                process.kill()
        for process, text in zip(running, errors, strict=True):
            assert process.returncode == 0, text[-4000:]
        return [json.loads(file.read_text()) for file in files]
