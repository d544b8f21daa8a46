"""The demo's assets with few rows: the reference is asked about every pair."""

import shutil
from pathlib import Path

from jalign.demo import ASSETS


def write_few(folder: Path, train: int = 64, held_out: int = 16) -> Path:
    """A copy of the assets in the folder, with the first rows of each file."""
    shutil.copytree(ASSETS, folder)
    for file in folder.glob("*.jsonl"):
        count = train if file.stem.endswith("_train") else held_out
        lines = file.read_text("utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:count]), "utf-8")
    return folder
