"""DPO of a tiny model of every family: on eight devices as on one; killed and resumed.

    PYTHONPATH=. python scripts/family_steps.py [FAMILY ...]

`make test` does so for a few families, this for all that tests/models/tiny.py lists.
Losses and parameters of three steps on data=2, fsdp=2, tensor=2 are compared with one
device's (1e-5); a run that is killed at its fourth step, and given again, has to end in
the bits of one that is not. Ends with 1 where one of them does not.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from jalign import data, sharding, train  # noqa: E402
from jalign.demo import ASSETS  # noqa: E402
from jalign.models import Model, ModelConfig, read_config, save  # noqa: E402
from jalign.train.evaluations import Callbacks  # noqa: E402
from tests.models.tiny import FAMILY_CONFIGS  # noqa: E402
from tests.sharding import steps  # noqa: E402

PAIRS = str(ASSETS / "preferences_train.jsonl")


class Killed(BaseException):
    """Nothing in jalign catches it."""


def on_a_mesh(config: ModelConfig) -> float:
    """The largest difference of a loss or parameter."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    one, many = (steps.train("dpo", m, config=config) for m in (None, mesh))
    return max(np.abs(np.subtract(many[k], one[k])).max() for k in one)


def resumed(config: ModelConfig, folder: Path) -> bool:
    """Whether a killed and continued run ends in the weights of a whole one."""
    base = read_config(ASSETS / "model")
    ids = {name: getattr(base, name) for name in ("bos_token_id", "eos_token_ids")}
    sizes: dict[str, Any] = {"vocab_size": base.vocab_size, "max_position": 128}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":  # both lengths give it
        pretrained = 128 // int(scaling.factor)
        new = dataclasses.replace(scaling, original_max_position=pretrained)
        sizes["rope_scaling"] = new
    model = Model(dataclasses.replace(config, **sizes, **ids))
    tokenizer = data.load_tokenizer(ASSETS / "model")
    save(folder / "model", model, model.init(jax.random.key(0)), tokenizer)
    how: dict[str, Any] = dict(data=PAIRS, steps=6, batch_size=8, checkpoint_every=2)
    how |= dict(model=str(folder / "model"), max_length=64)

    def die(step: int, _: dict[str, Any]) -> None:
        if step == 4:
            raise Killed

    train.run_dpo(out=str(folder / "whole"), **how)
    try:
        train.run_dpo(out=str(folder / "cut"), callbacks=Callbacks(on_step=die), **how)
    except Killed:
        train.run_dpo(out=str(folder / "cut"), **how)
    whole, cut = (
        load_file(folder / name / "model" / "model.safetensors")
        for name in ("whole", "cut")
    )
    return all(np.array_equal(whole[name], cut[name]) for name in whole)


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or FAMILY_CONFIGS:
        config = FAMILY_CONFIGS[name]
        difference = on_a_mesh(config)
        with tempfile.TemporaryDirectory() as folder:
            same = resumed(config, Path(folder))
        failed += not (same and difference <= 1e-5)
        print(f"{name:12s} mesh {difference:.1e}, resumed {same}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
