"""Mutation run: is every small error in jalign/losses seen by a test?

    python scripts/mutate_losses.py [--file dpo] [--sample 300] [--jobs 2]

Each mutant is one small change to one file's syntax tree. A process forked for it puts
it in the file's place and runs the tests concerned until one fails. What was seen goes
to build/mutation/results.jsonl as it comes; a second call goes on where the first was
stopped, --again runs the survivors once more. Docstrings, annotations and imports are
not mutated.
"""

import argparse
import collections
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOSSES, TESTS = ROOT / "jalign" / "losses", ROOT / "tests" / "losses"
WORK = ROOT / "build" / "mutation"
SECONDS_A_TEST = 120

# What a program compiles to does not depend on whether it is a mutant's: programs that
# a mutation leaves alone come from the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(WORK / "cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import chex  # noqa: E402, F401  (before the forks, so that each need not)
import jax.numpy  # noqa: E402, F401
import pytest  # noqa: E402
from mutants import Mutant, all_mutants, stratified  # noqa: E402


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
    told = re.compile(rf"jalign/losses/{name}\.py|\({name}\.py\)")
    lines = {
        p.stem: p.read_text("utf-8").splitlines()[0] for p in TESTS.glob("test_*.py")
    }
    return sorted(stem for stem, line in lines.items() if told.search(line))


def stages(name):
    """(test files, names whose tests in them are run; None for all) to be gone through.

    The file's own tests, the golden values of TRL, the properties of the file's names,
    then the own tests and the properties of the files that import it.
    """
    texts = {p.stem: p.read_text("utf-8") for p in LOSSES.glob("[a-z]*.py")}
    users, found = set(), {name}
    while found != users:
        users = found
        uses = re.compile(rf"from jalign\.losses\.({'|'.join(users)}) import")
        found = users | {stem for stem, text in texts.items() if uses.search(text)}
    names = {f: set(re.findall(r"^def ([a-z]\w*)", texts[f], re.M)) for f in users}
    others = sorted(users - {name})
    shared = ["test_properties", "test_traced_scalars", "test_explicit_mesh"]
    yield own_tests(name), None
    yield ["test_golden", "test_golden_policy", "test_golden_preference"], None
    yield shared, names[name]
    yield [test for f in others for test in own_tests(f)], None
    yield shared, set().union(*(names[f] for f in others))


def run_tests(name):
    """The first test that fails, or None."""
    for files, names in stages(name) if name else [([""], None)]:
        watch = Watch(names)
        paths = [str(TESTS / f"{f}.py" if f else TESTS) for f in files]
        options = ["-qx", "-pno:cacheprovider", "--assert=plain", f"--rootdir={ROOT}"]
        code = pytest.main([*options, *paths], [watch]) if files else 0
        if watch.failed or code not in (0, 5):  # 5: no test concerned
            return watch.failed or f"pytest's exit code {code}"


def fork(told, code):
    """Starts the process of a mutant -> (its id, where its answer will come)."""
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
        if code:
            sys.meta_path.insert(0, Mutant(f"jalign.losses.{told['file']}", code))
        answer = run_tests(told["file"]) or "survived"
        os.write(writer, answer.encode())
    finally:
        os._exit(0)


def run_all(todo, jobs, write):
    running, todo = {}, iter(todo)
    while True:
        for told, code in todo:
            pid, reader = fork(told, code)
            running[pid] = told, reader, time.time()
            if len(running) >= jobs:
                break
        if not running:
            return
        pid, status = os.wait()
        told, reader, start = running.pop(pid)
        by = os.read(reader, 4096).decode() or f"signal {os.WTERMSIG(status)}"
        os.close(reader)
        write({**told, "by": by, "seconds": round(time.time() - start, 1)})


def identity(told):
    return told["file"], told["of"], told["number"], told["kind"]


def summary(results):
    by_file = collections.defaultdict(list)
    for result in results:
        by_file[result["file"]].append(result["by"] != "survived")
    for name, killed in sorted(by_file.items()):
        print(f"{name:20} {sum(killed):4} of {len(killed):4} killed")
    for r in sorted(results, key=lambda r: (r["file"], r["line"])):
        if r["by"] == "survived":
            print(f"{r['file']}.py:{r['line']}  {r['before']}  ->  {r['after']}")
    killed = [x for one in by_file.values() for x in one]
    late = sum(r["by"].startswith("signal") for r in results)
    print(f"{sum(killed)} of {len(killed)} killed, {late} of them by time-out or crash")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--file", action="append", help="stem of one file; repeatable")
    parser.add_argument("--sample", type=int, help="about this many, over all files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="run survivors once more")
    parser.add_argument("--list", action="store_true", help="run nothing, show results")
    args = parser.parse_args()
    files = args.file or sorted(p.stem for p in LOSSES.glob("[a-z]*.py"))
    found = all_mutants(LOSSES, files, args.seed)
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

    if todo and not ended:
        unmutated = {"file": "", "of": "", "number": 0, "kind": "none"}
        run_all([(unmutated, None)], 1, write)
        if (by := done.pop(identity(unmutated))["by"]) != "survived":
            sys.exit(f"the tests fail without a mutation: {by}")
    run_all(todo, args.jobs, write)
    summary([done[identity(m)] for m, _ in found if identity(m) in done])


if __name__ == "__main__":
    main()
