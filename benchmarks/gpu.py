"""One GPU: a LLaMA of 1B, bfloat16, jalign beside plain torch and transformers.

    python -m benchmarks.gpu --jalign PYTHON --torch PYTHON

Each framework may have its own environment: jalign needs `jax[cuda13]`, the other one a
CUDA build of torch, and transformers. Weights are random and made in place. Parameters
and Adam's moments are float32 in both, the matrix products bfloat16 (torch: autocast),
attention is each one's fused kernel, torch's step goes through torch.compile.
`--dry-run` takes a tiny model on the CPU: it shows that the script works, nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from benchmarks import floor, measure
from benchmarks.settings import ROOT, Shape

# Llama 3.2 1B: 1.24B parameters, tied embeddings.
SHAPE = Shape(128256, 2048, 8192, 16, 32, 8)
TINY = Shape(512, 64, 128, 2, 4, 2)


SIZES = {
    "sft": {"rows": 8, "length": 2048},
    "dpo": {"rows": 8, "length": 1024},  # pairs
    "sample": {"rows": 64, "prompt": 128, "new": 512},
}
TINY_SIZES = {
    "sft": {"rows": 2, "length": 32},
    "dpo": {"rows": 2, "length": 32},
    "sample": {"rows": 2, "prompt": 8, "new": 8},
}
WARM, TIMED = 3, 10


def main() -> int:
    """Runs both frameworks and prints a table, or one as a worker."""
    args = parse_args()
    if args.worker:
        return work(args)
    rows = []
    for piece in args.only:
        for name in ("jalign", "torch"):
            result = run_worker(getattr(args, name), name, piece, args.dry_run)
            rows.append(_row(piece, name, result, args.dry_run))
    header = "| work | framework | device | step, s | tokens/s | MFU | peak GiB |"
    print("\n".join([header, "|" + "---|" * 7, *rows]))
    return 0


def parse_args() -> argparse.Namespace:
    """Options, and those of a worker."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", type=lambda x: x.split(","), default=list(SIZES))
    parser.add_argument("--jalign", default=sys.executable, help="Python with jalign")
    parser.add_argument("--torch", default=sys.executable, help="Python with torch")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--worker", choices=("jalign", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for piece in args.only:
        if piece not in SIZES:
            parser.error(f"--only: {piece!r} is not one of {', '.join(SIZES)}")
    return args


def run_worker(python: str, name: str, piece: str, dry_run: bool) -> dict[str, Any]:
    """The worker's result; raises SystemExit with its message if it has none."""
    command = [python, "-m", "benchmarks.gpu", "--worker", name, "--only", piece]
    environment = dict(os.environ)
    if dry_run:
        command.append("--dry-run")
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    marked = [x for x in done.stdout.splitlines() if x.startswith(measure.MARK)]
    if done.returncode or not marked:
        raise SystemExit(done.stderr.strip() or f"{name} {piece}: no result")
    return json.loads(marked[-1].removeprefix(measure.MARK))


def work(args: argparse.Namespace) -> int:
    """Measures one piece with one framework, in this process."""
    shape, sizes = (TINY, TINY_SIZES) if args.dry_run else (SHAPE, SIZES)
    device = "cpu" if args.dry_run else "gpu"
    piece = args.only[0]
    if args.worker == "jalign":
        from benchmarks import gpu_jalign as framework
    else:
        from benchmarks import gpu_torch as framework
    if not framework.has_device(device):
        print(
            f"benchmarks.gpu: {args.worker} sees no NVIDIA GPU. It needs one, with a "
            "CUDA build of jax (jalign) or of torch; `--dry-run` tries the script on "
            "the CPU.",
            file=sys.stderr,
        )
        return 2
    result = framework.PIECES[piece](shape, sizes[piece], device)
    print(f"\n{measure.MARK}{json.dumps(result)}", flush=True)
    return 0


def flops(piece: str, shape: Shape, size: dict[str, int]) -> float | None:
    """Of a step's matrix products, causal half of attention; None for sampling."""
    if piece == "sample":
        return None
    row = floor.forward_flops(shape, size["length"], size["length"] - 1)
    # DPO: two sides, and forward of the reference beside forward and backward.
    return size["rows"] * row * (3 if piece == "sft" else 2 * 4)


def tokens(piece: str, size: dict[str, int]) -> int:
    """Tokens trained on, or generated, in a step."""
    if piece == "sample":
        return size["rows"] * size["new"]
    return size["rows"] * size["length"] * (1 if piece == "sft" else 2)


def _row(piece: str, name: str, result: dict[str, Any], dry_run: bool) -> str:
    from jalign.train.metrics import PEAK_FLOPS

    shape, sizes = (TINY, TINY_SIZES) if dry_run else (SHAPE, SIZES)
    seconds = median(result["seconds"][WARM:])
    device, work_flops = result["device"], flops(piece, shape, sizes[piece])
    peak = next((x for start, x in PEAK_FLOPS if device.startswith(start)), None)
    mfu = f"{work_flops / seconds / peak:.1%}" if work_flops and peak else "–"
    rate = tokens(piece, sizes[piece]) / seconds
    memory = "–" if result["peak"] is None else f"{result['peak'] / 2**30:.1f}"
    cells = [piece, name, device, f"{seconds:.3f}", f"{rate:,.0f}", mfu, memory]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
