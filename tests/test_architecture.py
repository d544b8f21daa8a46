"""The house rules, read off the source with `ast` (docs/decisions.md, CONTRIBUTING)."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jalign"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(f.relative_to(PACKAGE)) for f in FILES]

ANY = frozenset({"*"})
# room -> jalign rooms it may import from. `cli` and `demo` may import everything.
MAY_IMPORT = {
    "__init__": ANY,
    "types": set(),
    "settings": set(),
    "terms": set(),
    "paths": set(),
    "mirror": {"paths"},
    "losses": {"losses"},
    "sharding": {"sharding"},
    "models": {"types", "sharding", "models", "paths", "mirror"},
    "forward": {"types", "models", "sharding", "losses"},
    "data": {"types", "settings", "data", "paths"},
    "generate": {"types", "models", "sharding", "losses", "generate"},
    "rewards": {"types", "models", "sharding", "data", "rewards", "pretrained"}
    | {"settings", "terms", "paths"},
    "pretrained": {"types", "models", "data"},
    "merge": {"settings", "models", "sharding", "pretrained", "paths"},
    "texts": {"types", "models", "data", "generate", "rewards"},
    "evaluate": {"types", "models", "sharding", "data", "losses", "generate"}
    | {"rewards", "forward", "texts"},
    "figures": {"figures"},
    "report": {"figures", "paths"},
    "plan": {"types", "settings", "models", "sharding", "losses", "train", "plan"}
    | {"generate", "report", "paths"},
    "train": {"types", "models", "sharding", "losses", "data", "generate", "train"}
    | {"forward", "rewards", "evaluate", "report", "pretrained", "settings"}
    | {"terms", "paths", "mirror"},
    "demo": ANY,
    "commands": ANY,
    "cli": ANY,
    "cli_options": {"settings", "train"},
    "cli_yaml": {"settings", "paths"},
    "__main__": ANY,
}
THIRD_PARTY = {
    "losses": {"jax", "chex"},
    "sharding": {"jax", "numpy"},
    "types": {"jax", "numpy"},
    "paths": {"fsspec", "upath"},
    "data": {"numpy", "grain", "datasets", "transformers", "jinja2", "pyarrow"},
    "generate": {"jax", "numpy"},
}
# third party -> the only rooms that may name it.
ONLY_IN = {
    "flax": {"models"},
    "optax": {"train", "plan"},
    "orbax": {"train/checkpoint"},
    "tyro": {"cli_options"},
    "torch": set(),
}
# Slow to load: only inside functions, so that `import jalign` stays quick.
LAZY = {"transformers", "datasets", "safetensors", "matplotlib", "huggingface_hub"}
LAZY |= {"fsspec", "upath"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST):
    """Yields (dotted module, is at module level) for every import in the tree."""
    top = set(getattr(tree, "body", []))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "jalign":
                for alias in node.names:
                    yield f"jalign.{alias.name}", node in top
            else:
                yield node.module, node in top


@pytest.fixture(scope="module")
def trees():
    return {f: ast.parse(f.read_text(encoding="utf-8")) for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_follow_the_table(path, trees):
    room = room_of(path)
    where = str(path.relative_to(PACKAGE).with_suffix(""))
    for module, at_top in imports(trees[path]):
        head, _, rest = module.partition(".")
        if head == "jalign":
            allowed = MAY_IMPORT[room]
            target = rest.partition(".")[0]
            assert allowed is ANY or target in allowed, f"{where} imports {module}"
            continue
        if head in sys.stdlib_module_names:
            continue
        if room in THIRD_PARTY:
            assert head in THIRD_PARTY[room], f"{where} imports {module}"
        if head in ONLY_IN:
            homes = ONLY_IN[head]
            assert room in homes or where in homes, f"{where} imports {module}"
        if head in LAZY:
            assert not at_top, f"{where} imports {module} at module level"


def test_data_flows_one_way(trees):
    """No room imports one above it: prints the floors, `pytest -s` shows them."""
    rooms: dict[str, set[str]] = {}
    for path, tree in trees.items():
        targets = {m.split(".")[1] for m, _ in imports(tree) if m.startswith("jalign.")}
        rooms.setdefault(room_of(path), set()).update(targets)
    graph = {room: targets - {room} for room, targets in rooms.items()}
    below, floor = set(), 0
    while rest := graph.keys() - below:
        here = {room for room in rest if graph[room] <= below}
        assert here, f"a circle of imports among {sorted(rest)}"
        print(f"floor {floor}:", *sorted(here))
        below, floor = below | here, floor + 1


# Tables of data and pages of settings are read by looking up, not from top to bottom.
TABLES = {"train/config.py", "train/online_config.py", "models/families_llama.py"}
TABLES |= {"data/columns.py"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_relative_imports_and_at_most_300_lines(path, trees):
    most = 400 if str(path.relative_to(PACKAGE)) in TABLES else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most
    for node in ast.walk(trees[path]):
        assert not (isinstance(node, ast.ImportFrom) and node.level), path


def names_in(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def calls_in(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_here_rules(path, trees):
    room, tree = room_of(path), trees[path]
    names, calls = set(names_in(tree)), set(calls_in(tree))
    if room != "sharding":
        assert "PartitionSpec" not in names, "PartitionSpec belongs to sharding/"
    if room not in {"cli", "__main__"}:
        assert not {"sys.argv", "argv"} & names, "argv belongs to cli.py"
        assert "environ" not in names or room == "sharding", "env belongs to cli.py"
        assert "jax.config.update" not in calls, "global jax config belongs to cli.py"
    if room != "cli" and path != PACKAGE / "train" / "metrics.py":
        assert "print" not in calls, "print belongs to cli.py and train/metrics.py"
    assert "eval" not in calls and "exec" not in calls


HF_NAME = re.compile(r"model\.layers|embed_tokens|lm_head|self_attn|_proj\b")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_hf_tensor_names_stand_in_families_only(path, trees):
    if path.parent.name == "models" and path.stem.startswith("famil"):
        return
    nodes = list(ast.walk(trees[path]))
    said = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}  # docstrings, help
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in said:
                assert not HF_NAME.search(node.value), f"{path}: {node.value!r}"


def module_of(init: Path):
    return importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))


def test_every_public_name_is_named_in_a_test():
    from tests.losses.cases import CASES  # some are read off the table of --loss

    tests = [f for f in (ROOT / "tests").rglob("*.py") if f != Path(__file__)]
    words = set(re.findall(r"\w+", " ".join(f.read_text() for f in tests))) | set(CASES)
    missing = [
        f"{path.parent.name}.{name}"
        for path in PACKAGE.rglob("__init__.py")
        for name in getattr(module_of(path), "__all__", ())
        # Types are named by what makes them; `run_sft` by its command, `jalign sft`.
        if name[0].islower() and name.removeprefix("run_") not in words
    ]
    assert not missing, f"no test names {missing}"


def test_every_public_name_is_documented():
    """Each name in an `__all__` has a docstring and a line in docs/api.md."""
    import inspect

    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rooms = ["losses", "models", "sharding", "data", "generate", "train"]
    rooms += ["pretrained", "rewards", "evaluate", "plan", "report", "types"]
    problems = []
    for room in rooms:
        module = importlib.import_module(f"jalign.{room}")
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        for name in public:
            value = getattr(module, name)
            documented = inspect.isclass(value) or inspect.isfunction(value)
            if documented and not inspect.getdoc(value):
                problems.append(f"{room}.{name}: no docstring")
            if f"`{name}`" not in api and f"`{name}(" not in api:
                problems.append(f"{room}.{name}: not in docs/api.md")
    assert not problems, "\n".join(problems)


def test_import_is_quick_and_without_side_effects():
    code = (
        "import sys, os; before = dict(os.environ); import jalign;"
        "import jax._src.xla_bridge as x;"
        "bad = [m for m in ('transformers', 'datasets', 'orbax', 'torch', 'flax')"
        " if m in sys.modules];"
        "assert not bad, bad; assert not x._backends, x._backends;"
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("room", ["losses", "sharding", "types"])
def test_light_rooms_load_only_jax_numpy_chex(room):
    code = (
        f"import sys, jalign.{room};"
        "bad = [m for m in ('transformers', 'datasets', 'orbax', 'flax', 'optax',"
        " 'grain') if m in sys.modules];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
