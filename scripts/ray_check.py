"""Under Ray Train two workers train as one process does, also where one is killed.

    python scripts/ray_check.py        # needs pip install "jalign[ray]"

Trains the tests' tiny model alone on four virtual CPU devices, then with two workers
of two each, and kills one of them by SIGKILL on the way. Ends with 1 unless the losses
of all steps agree to 1e-4 (relative) and the run has continued from a checkpoint. A few
minutes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.command_process import ROOT, finish, start
from tests.train import world

STEPS = 60
FLAGS = ("--steps", str(STEPS), "--checkpoint-every", "5", "--learning-rate", "1e-3")


def rows(out: Path) -> list[dict]:
    """What metrics.jsonl has by now."""
    file = out / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def under_ray(here: Path, out: Path, log: Path) -> subprocess.Popen:
    """The command with two workers, under way."""
    words = world.words("sft", here, out, *FLAGS, "--mesh", "", "--cpu-devices", "2")
    # How many processes there are is Ray's to say.
    at = words.index("--num-processes")
    del words[at : at + 2]
    script = ROOT / "scripts" / "launch" / "ray_train.py"
    return subprocess.Popen(
        [sys.executable, str(script), "--num-workers", "2", "--", *words],
        stdout=open(log, "wb"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def kill_one(log: Path) -> int:
    """The process that was killed: the worker of the higher number."""
    workers = re.findall(r"RayTrainWorker pid=(\d+)", log.read_text("utf-8", "replace"))
    victim = max(map(int, workers))
    os.kill(victim, signal.SIGKILL)
    return victim


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        here = world.make(Path(folder))
        one, two, log = here / "one", here / "two", here / "ray.log"
        alone = world.words(
            "sft", here, one, *FLAGS, "--mesh", "", "--cpu-devices", "4"
        )
        finish(start(alone))
        began = time.monotonic()
        run = under_ray(here, two, log)
        while len(rows(two)) < STEPS // 3:
            assert run.poll() is None, log.read_text("utf-8", "replace")
            time.sleep(0.1)
        victim = kill_one(log)
        code, text = run.wait(600), log.read_text("utf-8", "replace")
        seconds = time.monotonic() - began
        losses = [[row["loss"] for row in rows(out)] for out in (one, two)]
        apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
        resumed = re.findall(r"continuing from step \d+", text)
        print(
            f"{STEPS} steps by one process, and by two workers of Ray, of which "
            f"{victim} was killed: exit code {code}, "
            f"{', '.join(resumed) or 'never continued'}, largest relative difference "
            f"of a loss {apart:.1e}, {seconds:.0f} s"
        )
        return int(bool(code) or not resumed or apart > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
