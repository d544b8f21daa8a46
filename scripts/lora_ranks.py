"""Held-out loss of adapters beside full training, by rank and learning rate.

    python scripts/lora_ranks.py --model MODEL --data gsm8k_train.jsonl \
        --eval-data gsm8k_test.jsonl [--recipe sft] [--steps 300] [--ranks 4,16,64]

The same rows, order and number of steps for each; prints a Markdown table. What it has
printed stands in docs/adapters.md.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

from jalign import train

RUNS = {"sft": train.run_sft, "dpo": train.run_dpo}
FIGURES = {"sft": ("loss",), "dpo": ("log_loss", "accuracy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--recipe", choices=RUNS, default="sft")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=200, help="rows")
    parser.add_argument("--ranks", default="0,4,16,64", help="0: all")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2", help="of full training")
    parser.add_argument(
        "--times", type=float, default=3, help="a rank's rates are so many times those"
    )
    parser.add_argument("--train", default=None, help="embed: in full, beside them")
    args = parser.parse_args()
    logging.getLogger("jalign").setLevel(logging.ERROR)
    held_out = Path(args.eval_data).read_text("utf-8").splitlines()[: args.held_out]
    rates = [float(rate) for rate in args.rates.split(",")]
    names = FIGURES[args.recipe]
    print(f"| trained | rate | {' | '.join(f'held-out {name}' for name in names)} |")
    print("|---|---|" + "---|" * len(names))
    for rank in [int(rank) or None for rank in args.ranks.split(",")]:
        for rate in rates if rank is None else [rate * args.times for rate in rates]:
            figures = run(args, [json.loads(row) for row in held_out], rank, rate)
            cells = (f"{figures[f'eval_{name}']:.4f}" for name in names)
            what = "all" if rank is None else f"rank {rank}"
            what += f" and {args.train}" if rank and args.train else ""
            print(f"| {what} | {rate:g} | {' | '.join(cells)} |", flush=True)


def run(args: argparse.Namespace, held_out: list, rank: int | None, rate: float):
    with tempfile.TemporaryDirectory() as out:
        return RUNS[args.recipe](
            model=args.model,
            data=args.data,
            eval_data=held_out,
            out=out,
            steps=args.steps,
            batch_size=args.batch_size,
            max_length=args.max_length,
            checkpoint_every=0,
            learning_rate=rate,
            lora_rank=rank,
            lora_train=args.train if rank else None,
        )


if __name__ == "__main__":
    main()
