"""A training command of jalign on Ray Train's JaxTrainer. See docs/multihost.md.

    python scripts/launch/ray_train.py --num-workers 2 -- \
        sft --model MODEL --data rows.jsonl --out /mnt/share/run1 --mesh fsdp=-1

Behind `--` stand the words of `jalign`. Ray starts a worker on each host, tells them to
each other, and starts all again when one has died: the same command goes on from the
last checkpoint in --out, which every host has to see. The metrics go to Ray, too, and
so does where each checkpoint lies: OUT/ray has what Ray keeps of the run.

Needs `pip install "jalign[ray]"` on every node, and a cluster (RAY_ADDRESS), or else
runs on this machine.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxConfig, JaxTrainer

from jalign import cli


def main(argv: list[str]) -> None:
    options, words = parse(argv)
    config, _ = cli.read(words[0], words[1:])  # what is wrong is said here, at once
    out = Path(config.out).absolute()
    ray.init()
    JaxTrainer(
        train_on_worker,
        train_loop_config={
            "words": words,
            "out": str(out),
            "report_every": options.report_every,
        },
        jax_config=JaxConfig(use_tpu=options.topology is not None),
        scaling_config=scaling(options),
        run_config=RunConfig(
            name="ray",
            storage_path=str(out),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    ).fit()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the words of `jalign` behind them."""
    ours, dashes, words = argv, [], []
    if "--" in argv:
        at = argv.index("--")
        ours, dashes, words = argv[:at], argv[at], argv[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--num-workers", type=int, default=1, help="processes: one for each host")
    add("--gpus-per-worker", type=int, default=0, help="GPUs of a host")
    add("--topology", help="of a TPU slice, such as 4x4")
    add("--accelerator-type", help="of a TPU slice, such as TPU-V6E")
    add("--max-failures", type=int, default=3, help="restarts; -1 without end")
    add("--report-every", type=int, default=10, help="steps between reports to Ray")
    options = parser.parse_args(ours)
    if not dashes or not words or words[0] not in cli.RECIPES:
        parser.error(
            f"expected -- and one of {', '.join(cli.RECIPES)} with its options"
        )
    return options, words


def scaling(options: argparse.Namespace) -> ScalingConfig:
    """What Ray reserves: a slice, GPUs, or a CPU for each worker."""
    if options.topology is not None:
        return ScalingConfig(
            num_workers=options.num_workers,
            use_tpu=True,
            topology=options.topology,
            accelerator_type=options.accelerator_type,
        )
    if options.gpus_per_worker:
        return ScalingConfig(
            num_workers=options.num_workers,
            use_gpu=True,
            resources_per_worker={"GPU": options.gpus_per_worker},
        )
    return ScalingConfig(num_workers=options.num_workers)


def train_on_worker(given: dict[str, Any]) -> None:
    """The command, in one of the workers. Raises: RuntimeError where it fails, so that
    Ray ends the others and starts all again."""
    import jax

    from jalign import train

    words = [*given["words"], *host_words(jax.distributed.is_initialized())]
    reporter = Reporter(Path(given["out"]), given["report_every"])
    callbacks = train.Callbacks(on_step=reporter.on_step)
    code = cli.main(words, callbacks=callbacks)
    if code:
        raise RuntimeError(
            f"jalign {words[0]} ended with {code}: see its message above"
        )
    reporter.report()
    jax.distributed.shutdown()  # together, before Ray ends one after the other


def host_words(joined: bool) -> list[str]:
    """How the workers find each other; nothing where Ray has joined them (on a TPU,
    where it knows the slices)."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if joined:
        return []
    if size == 1:
        return ["--num-processes", "1"]
    with socket.socket() as probe:
        probe.bind(("", 0))
        here = f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
    first = broadcast_from_rank_zero(here)
    hosts = {"--coordinator": first, "--num-processes": size, "--process-id": rank}
    return [str(word) for pair in hosts.items() for word in pair]


class Reporter:
    """Tells Ray the metrics, and where the newest checkpoint lies.

    Every worker reports after the same steps, since a report waits for all; what
    counts is that of rank 0. A checkpoint of jalign stays where it is: Ray keeps a
    file with its path.
    """

    def __init__(self, out: Path, every: int):
        self._out, self._every = out, every
        self._row: dict[str, Any] = {}
        self._reported: int | None = None

    def on_step(self, step: int, row: dict[str, Any]) -> None:
        self._row = row
        if step % self._every == 0:
            self.report()

    def report(self) -> None:
        newest = (
            self._newest() if ray.train.get_context().get_world_rank() == 0 else None
        )
        if newest is None or newest == self._reported:
            ray.train.report(self._row)
            return
        self._reported = newest
        path = str(self._out / "checkpoints" / str(newest))
        with tempfile.TemporaryDirectory() as folder:
            pointer = json.dumps({"path": path, "step": newest})
            Path(folder, "jalign_checkpoint.json").write_text(pointer, encoding="utf-8")
            ray.train.report(self._row, checkpoint=Checkpoint.from_directory(folder))

    def _newest(self) -> int | None:
        """The last step in OUT/checkpoints; one that is not whole has another name."""
        folder = self._out / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=None)


if __name__ == "__main__":
    main(sys.argv[1:])
