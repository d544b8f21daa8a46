"""The tiny policy of ppo_world as a user meets it: files, and the command itself."""

import json
import logging
from pathlib import Path

from safetensors.numpy import load_file

from jalign import cli
from tests.train.ppo_world import WORDS, write_world


def write_rows(folder: Path, count: int = 12, first: int = 0) -> None:
    """rows.jsonl of prompts and completions, pairs.jsonl of preferences."""
    words = WORDS[3:]
    rows, pairs = [], []
    for i in range(first, first + count):
        prompt, yes, no = (words[(i * k) % 13] for k in (1, 5, 7))
        rows.append({"prompt": f"{prompt} b", "completion": f" {yes} {no}"})
        pair = {"chosen": f" {yes} c", "rejected": f" {no} d {yes}"}
        pairs.append({"prompt": f"{prompt} b"} | pair)
    for name, lines in (("rows", rows), ("pairs", pairs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def make(folder: Path) -> Path:
    """model/, prompts.jsonl, held_out.jsonl, reward.py, rows.jsonl and pairs.jsonl."""
    write_world(folder)
    write_rows(folder)
    return folder


def run(command: str, world: Path, out: Path, *flags: str) -> int:
    """The exit code of `jalign COMMAND`, of two steps of four rows."""
    return quietly(words(command, world, out, *flags))


def words(command: str, world: Path, out: Path, *flags: str) -> list[str]:
    """The command line that `run` runs; flags take the place of its own."""
    name = {"sft": "rows", "ppo": "prompts", "grpo": "prompts"}.get(command, "pairs")
    given = {
        "--model": str(world / "model"),
        "--data": str(world / f"{name}.jsonl"),
        "--out": str(out),
        "--steps": "2",
        "--batch-size": "4",
        "--max-length": "16",
        "--mesh": "fsdp=1",
        "--num-processes": "1",
    }
    kept = [w for flag in given if flag not in flags for w in (flag, given[flag])]
    return [command, *kept, *flags]


def quietly(words: list[str]) -> int:
    """cli.main, whose logging goes to this test's stderr and to no later one's."""
    handlers = logging.root.handlers[:]
    try:
        return cli.main(words)
    finally:
        logging.root.handlers[:] = handlers


def weights(out: Path) -> dict:
    return load_file(out / "model" / "model.safetensors")
