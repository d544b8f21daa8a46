"""Writes docs/api.md from the docstrings: `python scripts/make_api_docs.py [--check]`.

One row for each public name: its signature and the first sentence of its docstring.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

ROOMS = {
    "losses": "Pure functions on arrays.",
    "models": "One decoder, families as data, HF checkpoints in and out.",
    "sharding": "Meshes, rule tables, several hosts.",
    "data": "Rows to NumPy batches.",
    "pretrained": "A model with its tokenizer.",
    "generate": "Sampling with a KV cache.",
    "train": "Objectives, the step, the recipes.",
    "rewards": "What a completion is worth.",
    "evaluate": "Held-out measures.",
    "plan": "Will it fit.",
    "report": "The HTML report.",
    "types": "The NamedTuples between the rooms.",
}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "api.md"


def public_names(module) -> list[str]:
    """`__all__`, or the classes that the module itself defines."""
    named = getattr(module, "__all__", None)
    return named or [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]


def row(name: str, value) -> str:
    """`name(arguments)` and the first paragraph, on one table line."""
    text = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    text = text.replace("|", "\\|")
    if inspect.isfunction(value):
        arguments = ", ".join(
            ("*" if p.kind is p.VAR_POSITIONAL else "") + p.name
            for p in inspect.signature(value).parameters.values()
        )
        return f"| `{name}({arguments})` | {text} |"
    return f"| `{name}` | {text if callable(value) else 'a constant'} |"


def render() -> str:
    lines = ["# API", "", "Written by `scripts/make_api_docs.py`; do not edit.", ""]
    for room, text in ROOMS.items():
        module = importlib.import_module(f"jalign.{room}")
        lines += [f"## jalign.{room}", "", text, "", "| name | what |", "|---|---|"]
        lines += [row(name, getattr(module, name)) for name in public_names(module)]
        lines += [""]
    return re.sub(r"[ \t]+$", "", "\n".join(lines), flags=re.M)


def main() -> int:
    text = render()
    if "--check" in sys.argv:
        stale = not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text
        print("docs/api.md is stale: run scripts/make_api_docs.py" if stale else "ok")
        return int(stale)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
