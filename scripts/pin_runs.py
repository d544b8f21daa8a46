"""Did a change of the house change a number? Three steps of every recipe, bit for bit.

    python scripts/pin_runs.py before.json           # at the commit before
    python scripts/pin_runs.py after.json --against before.json

Runs sft, reward, dpo, ppo (with a critic, and with a head of the policy) and grpo on
the demo's model and rows; keeps what they write to metrics.jsonl but for the times, and
a digest of OUT/model. Equal only on one machine and with one version of jax: the files
are not committed. Ends with 1 where anything differs, and says what.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from jalign import train
from jalign.demo import ASSETS
from jalign.train.online_config import CriticConfig

TIMES = {"step_time", "tokens_per_second", "eps", "time/rollout", "time/update"}
PROMPTS = str(ASSETS / "prompts_train.jsonl")
PAIRS = str(ASSETS / "preferences_train.jsonl")
SAMPLING = train.SampleConfig(max_new_tokens=16)


def configs(out: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (recipe, its config)."""
    common: dict[str, Any] = dict(
        model=str(ASSETS / "model"),
        steps=3,
        batch_size=8,
        optim=train.OptimConfig(learning_rate=1e-3),
        eval_every=2,
    )
    pairs = common | {
        "data": PAIRS,
        "eval_data": str(ASSETS / "preferences_heldout.jsonl"),
    }
    online = common | {
        "data": PROMPTS,
        "eval_data": str(ASSETS / "prompts_heldout.jsonl"),
        "reward": str(out / "reward" / "model"),
        "max_length": 64,
    }
    ppo = train.PPOOptions(num_epochs=2, num_minibatches=2, sampling=SAMPLING)
    trunk = dataclasses.replace(ppo, critic=CriticConfig(shared_trunk=True))
    grpo = train.GRPOOptions(group_size=4, beta=0.1, sampling=SAMPLING)
    sft = common | {"data": str(ASSETS / "sft_train.jsonl")}
    del sft["eval_every"]
    return {
        "sft": (train.run_sft, train.SFTConfig(out=str(out / "sft"), **sft)),
        "reward": (
            train.run_reward,
            train.RewardConfig(out=str(out / "reward"), **pairs),
        ),
        "dpo": (train.run_dpo, train.DPOConfig(out=str(out / "dpo"), **pairs)),
        "ppo": (
            train.run_ppo,
            train.PPOConfig(out=str(out / "ppo"), ppo=ppo, **online),
        ),
        "ppo with a head": (
            train.run_ppo,
            train.PPOConfig(out=str(out / "trunk"), ppo=trunk, **online),
        ),
        "grpo": (
            train.run_grpo,
            train.GRPOConfig(out=str(out / "grpo"), grpo=grpo, **online),
        ),
    }


def pins(out: Path) -> dict[str, Any]:
    """Name -> its rows of metrics, without times, and a digest of the weights."""
    found = {}
    for name, (run, config) in configs(out).items():
        run(config)
        lines = (Path(config.out) / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [
            {k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in lines
        ]
        weights, sha = (
            Path(config.out) / "model" / "model.safetensors",
            hashlib.sha256(),
        )
        for tensor, value in sorted(load_file(weights).items()):  # in whatever order
            sha.update(tensor.encode() + value.tobytes())
        found[name] = {"rows": rows, "weights": sha.hexdigest()}
        print(f"{name}: {len(rows)} rows", flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not equal, in words."""
    found = [f"{name}: is missing" for name in before.keys() - after.keys()]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old["weights"] != new["weights"]:
            found.append(f"{name}: the weights differ")
        if len(old["rows"]) != len(new["rows"]):
            found.append(f"{name}: {len(old['rows'])} rows, now {len(new['rows'])}")
        for a, b in zip(old["rows"], new["rows"], strict=False):
            keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
            found += [
                f"{name}, step {a['step']}: {key} was {a.get(key)}, is {b.get(key)}"
                for key in sorted(keys)
            ]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="where the pins are written")
    parser.add_argument("--against", type=Path, help="pins to compare with")
    given = parser.parse_args()
    logging.getLogger("jalign").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = pins(Path(folder))
    given.out.write_text(json.dumps(found, indent=1), "utf-8")
    if given.against is None:
        return 0
    found = json.loads(given.out.read_text("utf-8"))
    differ = differences(json.loads(given.against.read_text("utf-8")), found)
    print("\n".join(differ) or "all equal")
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
