"""Tests for jalign/__main__.py: when the command restarts, and what it then has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jalign import __main__ as start

ROOT = Path(__file__).resolve().parents[1]
MADVISE, GLIBC = "always [madvise] never\n", "glibc 2.35"
ON = "glibc.malloc.hugetlb=1"
# Stands in for the command, in the process that is left in the end.
PROBE = """
import json, os, subprocess, sys
from jalign import cli, __main__ as start

def main():
    block = bytearray(2**26)
    flags = [x.split() for x in open("/proc/self/smaps") if x.startswith("VmFlags")]
    child = "import json, os; print(json.dumps(os.environ.get('GLIBC_TUNABLES')))"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    print(json.dumps({
        "pid": os.getpid(),
        "words": sys.argv[1:],
        "options": sys._xoptions,
        "huge": any("hg" in x for x in flags),
        "own": os.environ.get("GLIBC_TUNABLES"),
        "child": json.loads(done.stdout),
        "marked": start.RESTARTED in os.environ,
    }))
    return 7

if "-m" in sys.orig_argv:
    cli.main = main
"""


def test_the_environment_asks_for_huge_pages_and_keeps_the_rest():
    plain = {"HOME": "/h"}
    want = plain | {"GLIBC_TUNABLES": ON, start.RESTARTED: ""}
    assert start.with_huge_pages(plain, MADVISE, GLIBC) == want
    assert plain == {"HOME": "/h"}
    own = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
    assert start.with_huge_pages(own, MADVISE, "glibc 3.0") == {
        "GLIBC_TUNABLES": f"glibc.malloc.arena_max=1:{ON}",
        start.RESTARTED: "glibc.malloc.arena_max=1",
    }


@pytest.mark.parametrize(
    "tunables, kernel, libc",
    [
        ("glibc.malloc.hugetlb=0", MADVISE, GLIBC),
        (f"glibc.malloc.arena_max=1:{ON}", MADVISE, GLIBC),
        ("", "[always] madvise never\n", GLIBC),
        ("", "always madvise [never]\n", GLIBC),
        ("", "", GLIBC),  # no such file
        ("", MADVISE, "glibc 2.34"),
        ("", MADVISE, ""),  # musl
    ],
)
def test_there_is_no_restart(tunables, kernel, libc):
    environ = {"GLIBC_TUNABLES": tunables}
    assert start.with_huge_pages(environ, kernel, libc) is None


@pytest.mark.parametrize(
    "platforms, module, plugins, want",
    [
        ("cpu", "libtpu", ["cuda"], False),
        (None, None, [], False),
        ("cuda,cpu", None, [], False),  # named, but there is none
        (None, "libtpu", [], True),
        (None, "jax_plugins", [], True),
        (None, None, ["metal"], True),
    ],
)
def test_what_counts_as_an_accelerator(monkeypatch, platforms, module, plugins, want):
    monkeypatch.setattr(start, "find_spec", lambda name: name == module or None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    environ = {} if platforms is None else {"JAX_PLATFORMS": platforms}
    assert start.may_have_accelerator(environ) is want


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """The environments of the restarts of a command on a machine where they pay."""
    seen = []
    kernel = tmp_path / "enabled"
    kernel.write_text(MADVISE)
    monkeypatch.setattr(start, "KERNEL", kernel)
    monkeypatch.setattr(start, "libc_version", lambda: GLIBC)
    monkeypatch.setattr(start.os, "execve", lambda *args: seen.append(args))
    monkeypatch.setattr("jalign.cli.main", lambda: 7)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return seen


def test_a_restart_repeats_the_whole_command_line(restarts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "jalign", "sft"])
    assert start.main() == 7
    ((path, words, environ),) = restarts
    assert path == sys.executable and words == [path, "-X", "dev", "jalign", "sft"]
    assert environ["GLIBC_TUNABLES"] == ON and environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("own", ["", "glibc.malloc.arena_max=1"])
def test_after_a_restart_the_environment_is_the_user_s(restarts, monkeypatch, own):
    monkeypatch.setenv("GLIBC_TUNABLES", f"{own}:{ON}")
    monkeypatch.setenv(start.RESTARTED, own)
    assert start.main() == 7 and not restarts
    assert start.RESTARTED not in os.environ
    assert os.environ.get("GLIBC_TUNABLES", "") == own
    assert ("GLIBC_TUNABLES" in os.environ) == bool(own)


def test_where_nothing_is_gained_or_possible_the_command_goes_on(restarts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(start, "may_have_accelerator", lambda environ: True)
        assert start.main() == 7 and not restarts
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")  # embedded in another program
        assert start.main() == 7 and not restarts

    def refuse(*args):
        raise PermissionError("execve")

    monkeypatch.setattr(start.os, "execve", refuse)
    assert start.main() == 7


def pays_here() -> bool:
    kernel = start.KERNEL.read_text() if start.KERNEL.exists() else ""
    return start.with_huge_pages({}, kernel, start.libc_version()) is not None


@pytest.mark.skipif(not pays_here(), reason="needs Linux with [madvise], glibc >= 2.35")
@pytest.mark.parametrize(
    "own, huge",
    [
        (None, True),
        ("glibc.malloc.arena_max=1", True),
        ("glibc.malloc.hugetlb=0", False),
    ],
)
def test_a_process_of_the_command_has_huge_pages(tmp_path, own, huge):
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    environ.pop("GLIBC_TUNABLES", None)
    environ |= {"GLIBC_TUNABLES": own} if own else {}
    words = [sys.executable, "-X", "probe=1", "-m", "jalign", "sft", "two words"]
    process = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert json.loads(text) == {
        "pid": process.pid,
        "words": ["sft", "two words"],
        "options": {"probe": "1"},
        "huge": huge,
        "own": own,
        "child": own,
        "marked": False,
    }
