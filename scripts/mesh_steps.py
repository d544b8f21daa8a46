"""Every recipe on every kind of mesh, against one device: the largest differences.

    PYTHONPATH=. python scripts/mesh_steps.py [--steps N] [--meshes M ...] [RECIPE ...]

Whole runs of a tiny model, as `jalign RECIPE` starts them: packed rows of 128 tokens,
rollouts, reference, critic, reports. Losses of all steps and the parameters at the end
are compared with those of one device (1e-5, float32). `make test` does two recipes for
three steps, tests/sharding/test_step_invariance.py. Ends with 1 where they differ more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.sharding.processes import ROOT, free_port
from tests.train.ppo_world import WORDS, write_world

MESHES = ["fsdp=8", "tensor=4,fsdp=2", "data=2,fsdp=2,tensor=2", "context=4,fsdp=2"]
# Of 8 devices; "2 x" are two processes of 4.
MESHES += ["2 x context=8,fsdp=1", "2 x context=4,fsdp=2"]
MESHES += ["2 x fsdp=8", "4 x fsdp=4,tensor=2"]
TOLERANCE = 1e-5
# eps well above the rounding of gradients, by whose sign Adam would else step.
FLAGS: dict[str, Any] = {"max-length": 128, "learning-rate": 1e-3, "eps": 1e-5}
FLAGS |= {"batch-size": 8, "num-processes": 1}
OWN: dict[str, list[str]] = {
    "sft": ["--packing"],
    "reward": [],
    "dpo": [],
    "ppo": ["--max-new-tokens", "8", "--num-minibatches", "1"],
    "grpo": ["--max-new-tokens", "8", "--group-size", "4", "--batch-size", "4"],
}


def write_rows(folder: Path) -> None:
    """Rows of 60 to 110 words: long enough for the ways of attention of long rows."""
    random = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS[3:], random.integers(low, high)))

    kinds = {"rows": [], "pairs": [], "prompts": []}
    for _ in range(64):
        prompt = words(40, 70)
        kinds["prompts"].append({"prompt": prompt})
        kinds["rows"].append({"prompt": prompt, "completion": " " + words(20, 40)})
        sides = {side: " " + words(20, 40) for side in ("chosen", "rejected")}
        kinds["pairs"].append({"prompt": prompt} | sides)
    for name, rows in kinds.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run(recipe: str, mesh: str, world: Path, steps: int) -> tuple[list, dict]:
    """(losses, parameters) of a run in processes of its own."""
    count, _, sizes = mesh.rpartition(" x ")
    number = int(count or 1)
    data = {"sft": "rows", "ppo": "prompts", "grpo": "prompts"}.get(recipe, "pairs")
    out = world / f"{recipe} {mesh}"
    given = FLAGS | {"model": world / "model", "data": world / f"{data}.jsonl"}
    given |= {"out": out, "mesh": sizes, "steps": steps}
    given["cpu-devices"] = 8 // number
    if recipe in ("ppo", "grpo"):
        given["reward"] = f"{world / 'reward.py'}:share_of_a"
    if number > 1:
        address = f"127.0.0.1:{free_port()}"
        given |= {"num-processes": number, "coordinator": address}
    words = [w for name, value in given.items() for w in (f"--{name}", str(value))]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jalign", recipe, *words, *OWN[recipe]]
    ids = [["--process-id", str(i)] for i in range(number)] if number > 1 else [[]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command + i, env=env, **quiet) for i in ids]
    errors = [process.communicate()[1] for process in started]
    for process, text in zip(started, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"{recipe} on {mesh}: {text[-2000:]}")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses, load_file(out / "model" / "model.safetensors")


def differences(recipe: str, mesh: str, world: Path, steps: int, alone) -> list[float]:
    """The largest one of a loss, and of a parameter."""
    losses, params = run(recipe, mesh, world, steps)
    assert len(losses) == len(alone[0]), (losses, alone[0])
    largest = (np.abs(params[name] - alone[1][name]).max() for name in alone[1])
    return [float(np.abs(np.subtract(losses, alone[0])).max()), float(max(largest))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--meshes", nargs="*", default=MESHES)
    parser.add_argument("recipes", nargs="*", default=list(OWN))
    asked = parser.parse_args()
    worst = 0.0
    print("| recipe | mesh | loss | parameters |\n|---|---|---|---|", flush=True)
    for recipe in asked.recipes or OWN:
        with tempfile.TemporaryDirectory() as folder:
            write_world(world := Path(folder))
            write_rows(world)
            alone = run(recipe, "fsdp=1", world, asked.steps)
            for mesh in asked.meshes:
                found = differences(recipe, mesh, world, asked.steps, alone)
                worst = max(worst, *found)
                loss, params = (f"{x:.1e}" for x in found)
                print(f"| {recipe} | {mesh} | {loss} | {params} |", flush=True)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
