"""What the README and docs say exists: commands, flags, files, Python names."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from jalign import cli
from jalign.settings import flags_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
IDS = [page.name for page in PAGES]
SHELL = re.compile(r"```(?:bash|sh)\n(.*?)```", re.S)
PYTHON = re.compile(r"```python\n(.*?)```", re.S)


def commands(text: str):
    """Yields the words of every `jalign ...` line of the shell blocks."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\s)jalign (\w+)(.*)$", line.split("#")[0])
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


def run_blocks(page: str) -> None:
    """jalign's Python blocks of a page, in turn; not the other library's."""
    blocks = PYTHON.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    ours = [b for b in blocks if "ja." in b or "import jalign" in b]
    assert len(ours) >= 7
    names: dict = {}
    for block in ours:
        exec(compile(block, page, "exec"), names)


def test_what_users_of_trl_are_shown_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks("from_trl.md")
    for name in ("sft", "reward", "dpo", "orpo", "grpo", "ppo"):
        assert (tmp_path / "runs" / name / "model" / "config.json").exists()


def test_what_users_of_tunix_are_shown_has_settings_that_run(monkeypatch):
    """The same runs as on the other page: here they end where they would start."""
    from jalign.train import offline, online
    from jalign.train.rows import load_run_rows

    kinds = []

    def start(config, *_):
        rows, _ = load_run_rows(config.data, config)
        kinds.append((type(config).__name__, len(rows)))

    monkeypatch.setattr(offline, "run_recipe", start)
    monkeypatch.setattr(online, "_run", start)
    run_blocks("from_tunix.md")
    assert kinds == [(f"{k}Config", 8) for k in ("SFT", "DPO", "GRPO", "PPO")]
