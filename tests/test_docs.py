"""What the README and docs say exists: commands, flags, files, Python names."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from jalign import cli
from jalign.settings import flags_of
from jalign.train import offline, online
from jalign.train.rows import load_run_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
IDS = [page.name for page in PAGES]
SHELL = re.compile(r"```(?:bash|sh)\n(.*?)```", re.S)
PYTHON = re.compile(r"```python\n(.*?)```", re.S)


def commands(text: str):
    """Yields the words of every `jalign ...` line of the shell blocks."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = r"(?:^|\s)jalign (plan \w+|\w+)(.*)$"
            found = re.search(words, re.sub(" +", " ", line.split("#")[0]))
            if found and found[1] in cli.COMMANDS:
                yield found[1], shlex.split(found[2].rstrip("& "))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_flag_in_a_shell_block_exists(page):
    for name, words in commands(page.read_text(encoding="utf-8")):
        module, config, *_ = cli.COMMANDS[name]
        config_class = getattr(importlib.import_module(module), config)
        known = flags_of(config_class).keys() | flags_of(cli.Launch).keys()
        for word in words:
            if word.startswith("--") and word != "--config":
                flag = word[2:].partition("=")[0].replace("-", "_")
                flag = flag.removeprefix("no_") if flag not in known else flag
                assert flag in known, f"{page.name}: jalign {name} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_parse_and_name_what_exists(page):
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Attribute):
                continue
            path = ast.unparse(node).split(".")
            if path[0] == "ja" and len(path) == 3:
                room = importlib.import_module(f"jalign.{path[1]}")
                assert hasattr(room, path[2]), f"{page.name}: {'.'.join(path)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "in_full", "kinds"),
    [
        (
            "from_trl.md",
            ["SFT", "GRPO"],
            ["SFT", "Reward", "DPO", "DPO", "GRPO", "PPO", "SFT"],
        ),
        ("from_tunix.md", [], ["SFT", "DPO", "GRPO", "PPO"]),
    ],
)
def test_what_newcomers_are_shown_runs(page, in_full, kinds, tmp_path, monkeypatch):
    """jalign's Python blocks of a page, one after the other, and no others.

    Each compilation is slow: of every run the settings are made and its rows read, and
    those of one offline and one online recipe go to their end.
    """
    monkeypatch.chdir(tmp_path)
    seen, originals = [], {}
    for module, name in ((offline, "run_recipe"), (online, "_run")):
        originals[module] = getattr(module, name)

        def start(config, *rest, module=module):
            rows, _ = load_run_rows(config.data, config)
            seen.append(type(config).__name__.removesuffix("Config"))
            assert len(rows) == 8
            if seen[-1] in in_full:
                originals[module](config, *rest)

        monkeypatch.setattr(module, name, start)
    blocks = PYTHON.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    names: dict = {}
    for block in blocks:
        if "ja." in block or "import jalign" in block:
            exec(compile(block, page, "exec"), names)
    assert seen == kinds
    for kind in in_full:
        assert (tmp_path / "runs" / kind.lower() / "model" / "config.json").exists()
