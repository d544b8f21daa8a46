"""The script that makes the demo's assets, as a module."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_maker():
    path = ROOT / "scripts" / "make_demo_model.py"
    spec = importlib.util.spec_from_file_location("make_demo_model", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
