"""Where the steps of a run's checkpoints lie: on a disk, or in an object store.

On a disk a step is written under another name, and renamed once it is whole. A store
has no rename: there a step counts from when it has its last object, COMMITTED.

Orbax itself writes to disks and to gs://, all processes at once. What it cannot write
to takes a way over this host's disk, and one process only.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from jalign import sharding
from jalign.paths import (
    children,
    files_below,
    fresh,
    is_remote,
    make_folder,
    on_disk,
    reaching,
    remove_tree,
    upload,
    write_text,
)
from jalign.settings import check

COMMITTED = "commit_success.txt"  # orbax's name for it
_LEFTOVERS = re.compile(r".*\.orbax-checkpoint-tmp.*|.*\.deleting")
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")  # "007" and "٩٩" are not ours
_BY_ORBAX = ("gs", "gcs")


class StepFolders:
    """DIRECTORY/STEP of all steps; made by every process of a run.

    Args:
      directory: made when missing; what a killed run has left in it is removed.

    Raises: ValueError for several processes where one alone can write.
    """

    def __init__(self, directory: Path):
        self.directory, self._remote = directory, is_remote(directory)
        scheme = str(directory).partition("://")[0]
        over_disk = self._remote and scheme not in _BY_ORBAX
        check(
            not over_disk or jax.process_count() == 1,
            f"{directory}: several processes write checkpoints to gs:// or to folders "
            f"only, not to {scheme}://; mount it on every host, and give the folder",
        )
        self._thread = ThreadPoolExecutor(1) if over_disk else None
        if not sharding.is_main_process():
            return
        make_folder(directory)
        for path in children(directory):
            torn = self._remote and _STEP.fullmatch(path.name) and not _is_whole(path)
            if torn or _LEFTOVERS.fullmatch(path.name):
                remove_tree(path)

    def steps(self) -> list[int]:
        """Numbers of the steps there, oldest first, whether readable or not."""
        found = [p for p in children(self.directory) if _STEP.fullmatch(p.name)]
        whole = _is_whole if self._remote else Path.is_dir
        return sorted(int(path.name) for path in found if whole(path))

    def damaged(self) -> list[str]:
        """Names of what is left of damaged steps."""
        names = (path.name for path in children(self.directory))
        return [name for name in names if ".corrupt" in name]

    def remove(self, step: int) -> None:
        """Deletes a step; a kill leaves no half of one."""
        path = self.directory / str(step)
        if self._remote:
            with reaching(path):
                fresh(path / COMMITTED).unlink(missing_ok=True)
            remove_tree(path)
            return
        doomed = path.with_name(f"{path.name}.deleting")
        path.rename(doomed)
        remove_tree(doomed)

    def save(
        self, step: int, write: Callable[[str], None], wait: Callable[[], None]
    ) -> Callable[[], None]:
        """Has a step written, in the background.

        Args:
          step: its number; an older one of this number is replaced.
          write: (path) -> None; starts to write it there.
          wait: until that is done.

        Returns: () -> None, which waits until the step counts.
        """
        path = self.directory / str(step)
        if self._thread is None:
            write(str(path))
            return wait
        scratch = tempfile.TemporaryDirectory(prefix="jalign-")
        here = Path(scratch.name, path.name)
        write(str(here))

        def bring() -> None:
            with scratch:
                wait()
                self.remove(step)
                for file in files_below(here):
                    if file.name != COMMITTED:
                        upload(file, path / file.relative_to(here).as_posix())
                write_text(path / COMMITTED, "")

        return self._thread.submit(bring).result

    @contextlib.contextmanager
    def readable(self, path: Path) -> Iterator[Path]:
        """A step's folder where orbax can read it."""
        if self._thread is None:
            yield path
        else:
            with on_disk(path, "") as here:
                yield here


def _is_whole(path: Path) -> bool:
    """Whether a step in a store has its last object."""
    return fresh(path / COMMITTED).is_file()
