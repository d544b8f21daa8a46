"""Runs the notebooks top to bottom and saves them with their outputs.

    python scripts/run_notebooks.py [notebooks/01_sft.ipynb ...]

Each runs in an empty folder of its own, on the CPU. What is saved is the same wherever
it was run: no times of cells, no messages on stderr.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def run(path: Path) -> None:
    """Executes a notebook and writes it over itself."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources=where
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata = {
        "colab": {"provenance": []},
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    text = nbformat.writes(notebook)
    # `display` of a live figure names an object by its address.
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def joined(outputs: list) -> list:
    """The outputs without stderr, and what was printed bit by bit in one piece."""
    kept: list = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and kept[-1].get("name") == output.get("name") == "stdout":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    given = [Path(name) for name in sys.argv[1:]]
    for path in given or sorted((ROOT / "notebooks").glob("*.ipynb")):
        run(path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
