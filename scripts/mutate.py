"""Mutation run: is every small error in a file of jalign seen by a test?

    python scripts/mutate.py losses [--sample 120] [--jobs 2]
    python scripts/mutate.py train/step forward data/batching --sample 40
    python scripts/mutate.py models/positions --lines 62-79

What is named are files of jalign/, without .py, or folders: all their files. Each
mutant is one small change to one file's syntax tree. A process forked for it puts it in
the file's place and runs the tests concerned until one fails. Before that they are run
without a mutation. What was seen goes to build/mutation/results.jsonl as it comes; a
second call goes on where the first was stopped, --again runs the survivors once more.
Docstrings, annotations and imports are not mutated.
"""

import argparse
import collections
import importlib
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JALIGN, TESTS = ROOT / "jalign", ROOT / "tests"
WORK = ROOT / "build" / "mutation"
SECONDS_A_TEST = 120
# Where the tests are not those that say so in their first line; the quickest first.
CONCERNED = {
    "data/batching": "data/test_batching data/test_packing data/test_layout"
    " data/test_loader",
    "forward": "test_forward models/test_heads models/test_routing"
    " train/test_router_loss train/test_objectives",
    "losses/router": "models/test_routing",
    "models/heads": "models/test_heads models/test_model",
    "models/hf_rope": "models/test_hf_config models/test_families"
    " models/test_family_files",
    "models/layers": "models/test_layers models/test_heads",
    "train/rollout": "train/test_rollout train/test_online_eval",
    "train/step": "train/test_step",
}

# What a program compiles to does not depend on whether it is a mutant's: programs that
# a mutation leaves alone come from the cache. tests/conftest.py leaves LLVM's
# optimization out.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(WORK / "cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from mutants import Mutant, all_mutants, stratified  # noqa: E402

# Before the forks, so that each need not; of jalign nothing, since a mutant is put in
# place where its file is imported.
IMPORTED = "chex jax.numpy flax.linen optax orbax.checkpoint grain einops"
for _name in (*IMPORTED.split(), "transformers.tokenization_utils_tokenizers"):
    importlib.import_module(_name)


class Watch:
    """Runs the tests of some names, an alarm over each, and keeps the first failure."""

    def __init__(self, names):
        self.names, self.failed = names, None

    def pytest_collection_modifyitems(self, items):
        def concerned(item):
            name = getattr(item, "callspec", None) and item.callspec.params.get("name")
            return self.names is None or name in self.names

        items[:] = [item for item in items if concerned(item)]

    def pytest_runtest_logstart(self):
        signal.alarm(SECONDS_A_TEST)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed = self.failed or f"import of {report.nodeid}"


def own_tests(name):
    """The test files that say in their first line whose tests they are."""
    told = re.compile(rf"jalign/{name}\.py|\({Path(name).name}\.py\)")
    folder = (TESTS / name).parent
    lines = {p: p.read_text("utf-8").partition("\n")[0] for p in folder.glob("test_*")}
    return sorted(
        str(p.relative_to(TESTS).with_suffix(""))
        for p, line in lines.items()
        if told.search(line)
    )


def stages(name):
    """(test files, names whose tests in them are run; None for all) to be gone through.

    For a file of losses: its own tests, the golden values of TRL, the properties of its
    names, then the own tests and the properties of the files that import it.
    """
    if name in CONCERNED or not name.startswith("losses/"):
        yield CONCERNED[name].split() if name in CONCERNED else own_tests(name), None
        return
    texts = {
        f"losses/{p.stem}": p.read_text("utf-8")
        for p in (JALIGN / "losses").glob("[a-z]*.py")
    }
    users, found = set(), {name}
    while found != users:
        users = found
        stems = "|".join(f.removeprefix("losses/") for f in users)
        uses = re.compile(rf"from jalign\.losses\.({stems}) import")
        found = users | {f for f, text in texts.items() if uses.search(text)}
    names = {f: set(re.findall(r"^def ([a-z]\w*)", texts[f], re.M)) for f in users}
    others = sorted(users - {name})
    golden = ["test_golden", "test_golden_policy", "test_golden_preference"]
    shared = ["test_properties", "test_traced_scalars", "test_explicit_mesh"]
    golden, shared = ([f"losses/{f}" for f in files] for files in (golden, shared))
    yield own_tests(name), None
    yield golden, None
    yield shared, names[name]
    yield [test for f in others for test in own_tests(f)], None
    yield shared, set().union(*(names[f] for f in others))


def run_tests(stages):
    """The first test that fails, or None."""
    for files, names in stages:
        watch = Watch(names)
        paths = [str(TESTS / f"{f}.py") for f in dict.fromkeys(files)]
        options = ["-qx", "-pno:cacheprovider", "--assert=plain", f"--rootdir={ROOT}"]
        code = pytest.main([*options, *paths], [watch]) if files else 0
        if watch.failed or code not in (0, 5):  # 5: no test concerned
            return watch.failed or f"pytest's exit code {code}"


def fork(work):
    """Runs `work` in a process of its own -> (its id, where its answer will come)."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no backend is started yet: fork is safe
        pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.write(writer, (work() or "survived").encode())
    finally:
        os._exit(0)


def answer(reader, status):
    by = os.read(reader, 4096).decode() or f"signal {os.WTERMSIG(status)}"
    os.close(reader)
    return by


def run_mutant(told, code):
    module = "jalign." + told["file"].replace("/", ".")
    sys.meta_path.insert(0, Mutant(module, code))
    return run_tests(stages(told["file"]))


def run_unmutated(files):
    """Raises SystemExit where the tests that concern the files fail by themselves."""
    tests = [test for name in files for found, _ in stages(name) for test in found]
    pid, reader = fork(lambda: run_tests([(tests, None)]))
    _, status = os.waitpid(pid, 0)
    if (by := answer(reader, status)) != "survived":
        sys.exit(f"the tests fail without a mutation: {by}")


def run_all(todo, jobs, write):
    running, todo = {}, iter(todo)
    while True:
        for told, code in todo:
            pid, reader = fork(lambda told=told, code=code: run_mutant(told, code))
            running[pid] = told, reader, time.time()
            if len(running) >= jobs:
                break
        if not running:
            return
        pid, status = os.wait()
        told, reader, start = running.pop(pid)
        by, seconds = answer(reader, status), round(time.time() - start, 1)
        write({**told, "by": by, "seconds": seconds})


def identity(told):
    return told["file"], told["of"], told["number"], told["kind"]


def summary(results):
    by_file = collections.defaultdict(list)
    for result in results:
        by_file[result["file"]].append(result["by"] != "survived")
    for name, killed in sorted(by_file.items()):
        print(f"{name:26} {sum(killed):4} of {len(killed):4} killed")
    for r in sorted(results, key=lambda r: (r["file"], r["line"])):
        if r["by"] == "survived":
            print(f"{r['file']}.py:{r['line']}  {r['before']}  ->  {r['after']}")
    killed = [x for one in by_file.values() for x in one]
    late = sum(r["by"].startswith("signal") for r in results)
    print(f"{sum(killed)} of {len(killed)} killed, {late} of them by time-out or crash")


def files_of(names):
    """The files of jalign/ that are meant, as "losses/dpo"."""
    for name in names:
        path = JALIGN / name
        files = path.glob("[a-z]*.py") if path.is_dir() else [path.with_suffix(".py")]
        for file in sorted(files):
            found = file.relative_to(JALIGN).with_suffix("").as_posix()
            if not file.exists() or not any(tests for tests, _ in stages(found)):
                sys.exit(f"{found}: no such file, or no test in CONCERNED")
            yield found


def arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", help="losses, train/step, forward, ...")
    parser.add_argument("--sample", type=int, help="about this many, over all files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", default="0-999999", help="of the files: FIRST-LAST")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="run survivors once more")
    parser.add_argument("--list", action="store_true", help="run nothing, show results")
    return parser.parse_args()


def main():
    args = arguments()
    found = all_mutants(JALIGN, list(files_of(args.names)), args.seed)
    first, last = map(int, args.lines.split("-"))
    found = [m for m in found if first <= m[0]["line"] <= last]
    print(f"{len(found)} mutants")
    found = list(stratified(found, args.sample or len(found)))
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "results.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    done = {identity(r): r for r in map(json.loads, lines)}  # the last one counts
    again = ("survived",) if args.again else ()
    ended = {key for key, r in done.items() if r["by"] not in again}
    todo = [m for m in found if identity(m[0]) not in ended and not args.list]

    def write(result):
        done[identity(result)] = result
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    if todo:
        run_unmutated(sorted({told["file"] for told, _ in todo}))
    run_all(todo, args.jobs, write)
    summary([done[identity(m)] for m, _ in found if identity(m) in done])


if __name__ == "__main__":
    main()
