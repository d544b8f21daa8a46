"""Does the demo hold? Runs it over seeds and prints a table of what came of each.

    python scripts/demo_seeds.py --seeds 0-9 --out runs/seeds.jsonl

A claim about learning holds over seeds and on both jax versions, or is not made: run
it in an environment of each. Ends with 1 where a run misses a mark. Seeds that OUT has
already, of the same version, are not run again.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import jax

from jalign.demo import recipe

MARKS = {
    "RM accuracy": (">=", 0.90),
    "PPO preferred": (">=", 0.90),
    "PPO well formed": (">=", 0.90),
    "PPO KL": ("<=", 8.0),
    "DPO preferred": (">=", 0.88),
}


def run(seed: int) -> dict[str, float]:
    """The figures of one demo, by the columns of the table."""
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        rows = recipe.run_stages(recipe.DemoConfig(out=folder, seed=seed))
    by = {row["model"]: row for row in rows}
    return {
        "seed": seed,
        "SFT preferred": by["SFT"]["preferred"],
        "RM accuracy": by["reward model"]["reward accuracy"],
        "PPO preferred": by["PPO"]["preferred"],
        "PPO well formed": by["PPO"]["well formed"],
        "PPO KL": by["PPO"]["KL to SFT"],
        "DPO preferred": by["DPO"]["preferred"],
        "DPO KL": by["DPO"]["KL to SFT"],
        "seconds": time.perf_counter() - start,
        "CPU-s": time.process_time() - cpu,
    }


def missed(row: dict[str, float]) -> list[str]:
    """The marks that a row misses."""
    return [
        name
        for name, (sign, mark) in MARKS.items()
        if (row[name] < mark if sign == ">=" else row[name] > mark)
    ]


def table(rows: list[dict]) -> str:
    """Markdown, a row for each run and one for the worst of each column."""
    names = [name for name in rows[0] if name not in {"seconds", "CPU-s"}]
    text = {n: (lambda x: f"{x:.3f}") for n in names} | {
        "seed": str,
        "jax": str,
        "PPO KL": lambda x: f"{x:.2f}",
        "DPO KL": lambda x: f"{x:.2f}",
    }
    lines = [names, ["---"] * len(names)]
    lines += [[text[name](row[name]) for name in names] for row in rows]
    worst = [
        text[n]((max if n.endswith("KL") else min)(row[n] for row in rows))
        for n in names
        if n not in {"seed", "jax"}
    ]
    lines.append(["worst", "", *worst])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-9", help="first and last, as in 0-9")
    parser.add_argument("--out", default="runs/seeds.jsonl", help="where rows are kept")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    logging.getLogger("jalign").setLevel(logging.WARNING)
    for seed in range(int(first), int(last or first) + 1):
        if any((row["jax"], row["seed"]) == (jax.__version__, seed) for row in rows):
            continue
        rows.append({"jax": jax.__version__} | run(seed))
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    bad = {f"jax {r['jax']} seed {r['seed']}": missed(r) for r in rows if missed(r)}
    print("all marks hold" if not bad else f"missed: {bad}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
