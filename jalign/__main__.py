"""The `jalign` command, which is also `python -m jalign`.

XLA on a CPU allocates all temporaries of a program at each call, and glibc maps such
large blocks anew: page faults took a tenth of an SFT step of a 7M model. With huge
pages there are few. glibc reads that setting only when a process starts, so that the
command starts itself once more where this pays.
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
RESTARTED = "_JALIGN_RESTARTED"  # holds the user's own tunables
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main() -> int:
    """Runs the command in argv, restarted or not; returns its exit code."""
    if RESTARTED in os.environ:
        forget_restart()
    else:
        try:
            restart_if_it_pays()
        except OSError:  # it would only have been faster
            pass
    from jalign.cli import main as run_command  # slow, and not needed before

    return run_command()


def restart_if_it_pays() -> None:
    """Becomes the same process with huge pages, or returns and nothing has changed."""
    kernel = KERNEL.read_text() if KERNEL.exists() else ""
    environ = with_huge_pages(os.environ, kernel, libc_version())
    if environ and sys.executable and not may_have_accelerator(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def with_huge_pages(
    environ: Mapping[str, str], kernel: str, libc: str
) -> dict[str, str] | None:
    """The environment in which malloc asks for huge pages, with a note for after.

    None where the user has chosen already, where another C library or a glibc before
    2.35 would not read it, and where the kernel does not wait to be asked: it may give
    huge pages to all ("always") or to none ("never").
    """
    own = environ.get(TUNABLES, "")
    name, _, version = libc.partition(" ")
    if HUGE_PAGES in own or "[madvise]" not in kernel or name != "glibc":
        return None
    if tuple(map(int, version.split(".")[:2])) < (2, 35):
        return None
    tunables = f"{own}:{HUGE_PAGES}=1".lstrip(":")
    return {**environ, TUNABLES: tunables, RESTARTED: own}


def forget_restart() -> None:
    """Leaves the environment as the user gave it, for processes that are started."""
    os.environ[TUNABLES] = os.environ.pop(RESTARTED)
    if not os.environ[TUNABLES]:
        del os.environ[TUNABLES]


def libc_version() -> str:
    """As "glibc 2.36"; empty with a C library that does not say."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def may_have_accelerator(environ: Mapping[str, str]) -> bool:
    """Whether jax may find one, on which nothing is gained; jax is not asked: slow."""
    if environ.get("JAX_PLATFORMS") == "cpu":
        return False
    if find_spec("libtpu") or find_spec("jax_plugins"):
        return True
    from importlib.metadata import entry_points  # slow

    return bool(entry_points(group="jax_plugins"))


if __name__ == "__main__":
    raise SystemExit(main())
