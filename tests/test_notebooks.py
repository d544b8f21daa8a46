"""The notebooks run top to bottom, as they stand, on the embedded model."""

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]


def test_there_are_three():
    assert IDS == ["01_sft", "02_dpo", "03_reward_ppo"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_is_clean_and_switches_in_one_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert "find_spec" in code[0].source and "%pip install" in code[0].source
    assert "MODEL = " in code[1].source and "# MODEL = " in code[1].source
    # What is measured is never what was trained on.
    names = re.findall(r"# \w+, HELD_OUT\w* = ([^\n]+)", code[1].source)
    assert names and all("train" in name and "test" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    # The kernel is a process of its own: it takes the environment, not jax.config.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    # Slower at tests/conftest.py's level 0, for they compute more than they compile.
    flags = os.environ["XLA_FLAGS"].replace("level=0", "level=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), *sys.path]))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    text = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "Tell a story about" in text
