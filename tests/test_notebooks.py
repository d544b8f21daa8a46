"""The notebooks run top to bottom, and show what came of it before they do."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jalign import train
from jalign.settings import settings_or
from tests.demo.few import write_few

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
CONFIGS = {
    "01_sft": {"SETTINGS": train.SFTConfig},
    "02_dpo": {"SETTINGS": train.DPOConfig},
    "03_reward_ppo": {"REWARD": train.RewardConfig, "PPO": train.PPOConfig},
    "05_qlora": {"SETTINGS": train.SFTConfig, "SFT": train.SFTConfig},
}
# They have a split "test", by their pages on the hub.
HUB = {"trl-lib/Capybara", "trl-lib/ultrafeedback_binarized"}
HUB |= {"trl-lib/ultrafeedback-prompt"}
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells):
    """(all text, all pictures) that the cells have put out."""
    texts, pictures = [], []
    for output in (output for cell in cells for output in cell.outputs):
        texts.append(output.get("text", ""))
        texts.append(output.get("data", {}).get("text/plain", ""))
        pictures += [p for kind, p in output.get("data", {}).items() if "png" in kind]
    return "".join(texts), pictures


def test_there_are_five():
    first = ["01_sft", "02_dpo", "03_reward_ppo", "04_your_own_loss"]
    assert IDS == [*first, "05_qlora"]


@EACH
def test_a_notebook_opens_in_colab_and_installs_from_one_place(path):
    notebook, code = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    badge = notebook.cells[0].source
    owner = re.findall(r"colab-badge\.svg\).*/github/(\S+)/blob/main/(\S+)\)", badge)
    install = code[0].source
    where = re.findall(r'^JALIGN = "git\+https://github.com/(\S+)"', install, re.M)
    assert owner == [(where[0], f"notebooks/{path.name}")]
    assert 'find_spec("jalign") is None' in install
    assert '%pip install -q "{JALIGN}"' in install
    assert f"github/{where[0]}/blob/main/notebooks/{path.name}" in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


@EACH
def test_a_notebook_shows_its_outputs_and_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 300_000
    # Paths of a machine, addresses of objects, messages of libraries.
    assert not re.search(r"/(work|root|tmp|home|Users)/|0x[0-9a-f]{6}|Warning", text)
    _, code = read(path)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    printed, pictures = outputs(code)
    assert pictures and printed
    assert not [o for c in code for o in c.outputs if o.get("name") == "stderr"]


SWITCHED = [path for path in NOTEBOOKS if path != NOTEBOOKS[3]]


@pytest.mark.parametrize("path", SWITCHED, ids=[path.stem for path in SWITCHED])
def test_one_cell_switches_to_the_hub_and_holds_out_another_split(path):
    settings = read(path)[1][1].source
    assert "MODEL = " in settings and "# MODEL = " in settings
    lines = [line[2:] for line in settings.splitlines() if line.startswith("# ")]
    hub = "\n".join(lines)[len("\n".join(lines).partition("MODEL = ")[0]) :]
    asked = set()

    def load_rows(source, *, split, limit=None):
        asked.add(source)
        return [split]

    found: dict = {"ja": SimpleNamespace(data=SimpleNamespace(load_rows=load_rows))}
    exec(hub, found)
    assert asked <= HUB
    held_out = [rows for name, rows in found.items() if name.startswith("HELD_OUT")]
    trained = [found[x] for x in ("TRAIN", "PAIRS", "PROMPTS") if x in found]
    assert held_out == [["test"]] * len(trained) and trained
    assert all(rows == ["train"] for rows in trained)
    # What is live and what is commented set the same names, and flags that there are.
    assert set(re.findall(r"^([A-Z_]+)\b.* = ", settings, re.M)) <= set(found)
    for name, config in CONFIGS[path.stem].items():
        given = {"model": found["MODEL"], "data": "x.jsonl", "out": found["OUT"]}
        reward = {"reward": "gsm8k"} if name == "PPO" else {}
        settings_or(config, None, given | reward | found[name])


FEW = """
import pathlib
import jalign.demo
jalign.demo.ASSETS = pathlib.Path({!r})
"""


@pytest.mark.slow
@EACH
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    # The kernel is a process of its own: it takes the environment, not jax.config.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    notebook, code = read(path)
    steps = 0
    few = write_few(tmp_path / "assets")
    # Few rows and steps: what they would learn is in the outputs that are saved.
    code[0].source += FEW.format(str(few))
    for cell in code:
        cell.outputs = []
        given = re.subn(r"^(\w*STEPS) = \d+$", r"\1 = 4", cell.source, flags=re.M)
        cell.source, steps = given[0], steps + given[1]
    assert steps
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where
    )
    client.execute()
    printed, _ = outputs(code)
    assert ("held-out accuracy" if path == NOTEBOOKS[3] else "Tell a story") in printed
