"""CPU-seconds and memory of making examples of rows, in one process and in several.

    PYTHONPATH=. python scripts/rows_by_share.py sft|dpo|prompts DATA --model MODEL
        [--rows 20000] [--processes 1,2] [--max-length 1024]

DATA is read as --data of a run is, again and again until there are so many rows. A
table says, of the process that took most: CPU-seconds of the encoding, all threads
counted; of those what it took for rows that it did not encode itself (reading is not
counted); seconds; peak resident memory over what the rows and the tokenizer take; what
the examples take of it in the end. Ends with 1 where processes have other examples than
one has.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.sharding import processes

COLUMNS = ("cpu", "seconds", "peak", "kept")


def memory(name: str) -> int:
    """Bytes of this process's VmRSS (resident now), or VmHWM (the most so far)."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) << 10


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """In one of the processes: what it took, and the digest of the examples."""
    import itertools
    import time

    from jalign import data
    from jalign.train.inputs import examples_digest
    from jalign.train.rows import examples_of, read_rows

    length, words = options["max_length"], ("max_length", "max_prompt_length")
    make = {
        "sft": data.sft_examples,
        "dpo": data.preference_examples,
        "prompts": data.prompt_examples,
    }[options["kind"]]
    found = read_rows(options["data"])
    chosen = list(itertools.islice(itertools.cycle(found), options["rows"]))
    rows = data.Rows(data.Row(row, f"row {i}") for i, row in enumerate(chosen))
    how: Any = {words[options["kind"] == "prompts"]: length, "bad_rows": "skip"}
    tokenizer = data.load_tokenizer(options["model"])
    examples_of(make, rows[:8], tokenizer, **how)  # whatever the first call compiles
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM counts from here
    before, cpu, began = memory("VmRSS"), time.process_time(), time.perf_counter()
    examples, _ = examples_of(make, rows, tokenizer, **how)
    took = {"cpu": time.process_time() - cpu, "seconds": time.perf_counter() - began}
    sizes = {"peak": memory("VmHWM") - before, "kept": memory("VmRSS") - before}
    return took | sizes | {"digest": examples_digest(examples)}


def _child():
    import json
    import os

    from scripts.rows_by_share import measure

    return measure(json.loads(os.environ["JALIGN_ROWS"]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("sft", "dpo", "prompts"))
    parser.add_argument("data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    os.environ["JALIGN_ROWS"] = json.dumps(vars(options))
    print("processes", *(name.rjust(9) for name in COLUMNS), "  (MB)")
    digests = set()
    for count in map(int, options.processes.split(",")):
        found = processes.run(_child, count=count, devices=1, timeout=3600)
        digests |= {row["digest"] for row in found}
        worst = {name: max(row[name] for row in found) for name in COLUMNS}
        scales = {"cpu": 1, "seconds": 1, "peak": 1e6, "kept": 1e6}
        numbers = (f"{worst[name] / scale:9.1f}" for name, scale in scales.items())
        print(f"{count:9}", *numbers, flush=True)
    return int(len(digests) > 1)


if __name__ == "__main__":
    sys.exit(main())
