"""Continuing a PPO run: the same settings, and both models from one checkpoint."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jalign.train.actors import Cast
from jalign.train.checkpoint import Checkpointer
from jalign.train.ppo import Learner, PPOState
from jalign.train.ppo_config import PPOConfig
from jalign.train.step import abstract_state

_log = logging.getLogger("jalign.train")


def fingerprint(config: PPOConfig) -> dict[str, Any]:
    """The settings that a continued run must share with the one that began."""
    free = ("out", "steps", "epochs", "mesh", "checkpoint_every", "resume", "eval_data")
    settings = dataclasses.asdict(config)
    settings["ppo"] = {
        k: v for k, v in settings["ppo"].items() if k not in ("compute", "save_critic")
    }
    settings["ppo"]["sampling"]["stop_token_ids"] = list(
        config.ppo.sampling.stop_token_ids
    )
    return {name: value for name, value in settings.items() if name not in free}


def restore(
    checkpointer: Checkpointer, cast: Cast, learner: Learner, config: PPOConfig
) -> tuple[PPOState | None, dict[str, Any]]:
    """The newest good checkpoint's state and record, or (None, {}).

    Raises: ValueError where OUT holds a run of other settings, or one that is not to
      be continued.
    """
    if not checkpointer.steps():
        return None, {}
    if not config.resume:
        raise ValueError(
            f"{checkpointer.directory} holds checkpoints of an earlier run: leave out "
            "--no-resume to continue it, or give another --out"
        )
    record = checkpointer.peek() or {}
    check_fingerprint(record.get("fingerprint", {}), fingerprint(config), config.out)
    mesh = cast.policy.mesh
    found = checkpointer.restore(
        {
            "policy": abstract_state(
                cast.policy.param_shapes(), learner.policy_tx, mesh=mesh
            ),
            "critic": abstract_state(
                cast.critic.param_shapes(), learner.critic_tx, mesh=mesh
            ),
        }
    )
    if found is None:
        return None, {}
    _log.info("continuing from iteration %d", found.step)
    states, kl_coef = found.tree, found.meta["kl_coef"]
    return PPOState(states["policy"], states["critic"], kl_coef, found.step), found.meta


def check_fingerprint(old: Mapping[str, Any], new: Mapping[str, Any], out: str) -> None:
    """Raises ValueError naming the first setting that differs from the run in OUT."""
    for name, value in new.items():
        if name in old and old[name] != value:
            raise ValueError(
                f"{out} holds a run with {name} = {old[name]!r}, but now it is "
                f"{value!r}: give another --out, or the same settings to continue"
            )
