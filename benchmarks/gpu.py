"""One GPU: a LLaMA of 1B, bfloat16, jalign beside plain torch and transformers.

    python -m benchmarks.gpu --jalign PYTHON --torch PYTHON

Each framework may have its own environment: jalign needs `jax[cuda13]`, the other one a
CUDA build of torch, and transformers. Weights are random and made in place. Parameters
and Adam's moments are float32 in both, the matrix products bfloat16 (torch: autocast),
attention is each one's fused kernel, torch's step goes through torch.compile. `packed`
has several documents in a row, which only jalign keeps apart without a mask of its own.
`--profile` adds the operations that took longest in one more step of jalign.
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
    "packed": {"rows": 8, "length": 2048},
    "dpo": {"rows": 8, "length": 1024},  # pairs
    "sample": {"rows": 64, "prompt": 128, "new": 512},
}
TINY_SIZES = {
    "sft": {"rows": 2, "length": 32},
    "packed": {"rows": 2, "length": 32},
    "dpo": {"rows": 2, "length": 32},
    "sample": {"rows": 2, "prompt": 8, "new": 8},
}
WARM, TIMED = 3, 10
PACKED = 4  # documents in a row of `packed`
ONLY_JALIGN = ("packed",)


def main() -> int:
    """Runs both frameworks and prints a table, or one as a worker."""
    args = parse_args()
    if args.worker:
        return work(args)
    header = (
        "| work | framework | device | step, s | tokens/s | MFU | peak GiB | first, s |"
    )
    print(f"{header}\n{'|' + '---|' * 8}", flush=True)
    failures, profiles = [], []
    for piece in args.only:
        for name in ("jalign", "torch"):
            if name == "torch" and piece in ONLY_JALIGN:
                continue
            result = run_worker(args, name, piece)
            if isinstance(result, str):
                failures.append(f"{name} {piece}: {result}")
                continue
            print(_row(piece, name, result, args.dry_run), flush=True)
            if "top" in result:
                profiles.append(_profile(piece, result["top"]))
    print("\n".join(["", *profiles]))
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def parse_args() -> argparse.Namespace:
    """Options, and those of a worker."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", type=lambda x: x.split(","), default=list(SIZES))
    parser.add_argument("--jalign", default=sys.executable, help="Python with jalign")
    parser.add_argument("--torch", default=sys.executable, help="Python with torch")
    parser.add_argument("--profile", action="store_true", help="jalign's longest ops")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--worker", choices=("jalign", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for piece in args.only:
        if piece not in SIZES:
            parser.error(f"--only: {piece!r} is not one of {', '.join(SIZES)}")
    return args


def run_worker(args: argparse.Namespace, name: str, piece: str) -> dict[str, Any] | str:
    """The worker's result, or the end of its message if it has none."""
    command = [getattr(args, name), "-m", "benchmarks.gpu"]
    command += ["--worker", name, "--only", piece]
    # Nothing else runs on the device; torch's allocator must not fragment either.
    environment = dict(os.environ) | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if args.profile:
        command.append("--profile")
    if args.dry_run:
        command.append("--dry-run")
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    marked = [x for x in done.stdout.splitlines() if x.startswith(measure.MARK)]
    if done.returncode or not marked:
        return done.stderr.strip()[-2000:] or "no result"
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
    options = {"profile": args.profile} if args.worker == "jalign" else {}
    result = framework.PIECES[piece](shape, sizes[piece], device, **options)
    print(f"\n{measure.MARK}{json.dumps(result)}", flush=True)
    return 0


def flops(piece: str, shape: Shape, size: dict[str, int]) -> float | None:
    """Of a step's matrix products, causal half of attention; None for sampling."""
    if piece == "sample":
        return None
    documents = PACKED if piece == "packed" else 1
    length = size["length"] // documents
    row = documents * floor.forward_flops(shape, length, length - 1)
    # DPO: two sides, and forward of the reference beside forward and backward.
    return size["rows"] * row * (2 * 4 if piece == "dpo" else 3)


def tokens(piece: str, size: dict[str, int]) -> int:
    """Tokens trained on, or generated, in a step."""
    if piece == "sample":
        return size["rows"] * size["new"]
    return size["rows"] * size["length"] * (2 if piece == "dpo" else 1)


def _row(piece: str, name: str, result: dict[str, Any], dry_run: bool) -> str:
    from jalign.sharding.machines import chip_of

    shape, sizes = (TINY, TINY_SIZES) if dry_run else (SHAPE, SIZES)
    seconds = median(result["seconds"][WARM:])
    device, work_flops = result["device"], flops(piece, shape, sizes[piece])
    chip = chip_of(device)
    peak = chip.flops if chip else None
    mfu = f"{work_flops / seconds / peak:.1%}" if work_flops and peak else "–"
    rate = tokens(piece, sizes[piece]) / seconds
    memory = "–" if result["peak"] is None else f"{result['peak'] / 2**30:.1f}"
    cells = [piece, name, device, f"{seconds:.3f}", f"{rate:,.0f}", mfu, memory]
    cells.append(f"{result['seconds'][0]:.1f}")
    return "| " + " | ".join(cells) + " |"


def _profile(piece: str, top: list[tuple[str, float, int]]) -> str:
    rows = [f"{ms:9.2f} ms  {count:5d} x  {name}" for name, ms, count in top]
    return "\n".join([f"{piece}, one step of jalign, by operation:", *rows])


if __name__ == "__main__":
    sys.exit(main())
