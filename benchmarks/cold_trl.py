"""TRL's share of the cold start, as its documentation shows it:
`python -m benchmarks.cold_trl PIECE MODEL ROWS.jsonl OUT`."""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import load_dataset
from transformers import TrainerCallback

from benchmarks import settings
from benchmarks.trl_options import options

TRAINERS = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}


class Lines(TrainerCallback):
    """Writes OUT/metrics.jsonl, a line when a step is done and its loss is known."""

    def __init__(self, out: str):
        Path(out).mkdir(parents=True, exist_ok=True)
        self.file = open(Path(out) / "metrics.jsonl", "w")  # noqa: SIM115

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The loss of a step, and not the summary at the end."""
        if logs and "loss" in logs:
            row = {"step": state.global_step, "loss": float(logs["loss"])}
            print(json.dumps(row), file=self.file, flush=True)


def main() -> int:
    """Trains; the imports are no more than the piece needs."""
    piece, model, rows, out = sys.argv[1:]
    torch.set_num_threads(settings.THREADS)
    config = getattr(trl, f"{TRAINERS[piece]}Config")
    shared = options(piece, out, settings.COLD_STEPS)
    if piece == "dpo":
        shared["beta"] = settings.BETA
    trainer = getattr(trl, f"{TRAINERS[piece]}Trainer")(
        model=model,
        args=config(**shared),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
    )
    trainer.add_callback(Lines(out))
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
