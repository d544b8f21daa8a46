"""Rows from files, directories, the Hugging Face hub and memory, by split."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jalign.data.files import (
    KNOWN,
    canonical,
    dataset_rows,
    is_data_file,
    listed_rows,
    named_splits,
    read_file,
    split_of,
    uncompressed_name,
)
from jalign.data.rows import BadRow, Row, Rows, settle
from jalign.paths import files_below, is_url, located

logger = logging.getLogger("jalign.data")

_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_DESCRIPTIONS |= {"state.json", "_SUCCESS", "LICENSE", "LICENSE.txt", "NOTICE"}
_ADVICE = "name one of them, by --split or --eval-split NAME or as SOURCE[NAME]"


class Table(Protocol):
    """A `datasets.Dataset`, or a DatasetDict of several."""

    @property
    def column_names(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


Given = Sequence[Mapping[str, Any]] | Table
Source = str | Path | Given | Mapping[str, Given]
"""Where rows come from: the name of a file, folder or hub data set; a list of dicts or
a `datasets.Dataset`; or a mapping of splits of these, such as a DatasetDict."""


class _Part(NamedTuple):
    """One of the sources, opened: which split of it, and its rows."""

    split: str | None
    rows: Iterator[Row | BadRow]


class _Asked(NamedTuple):
    """Splits in order of preference; `said` if the user has named the one."""

    splits: tuple[str, ...]
    said: bool

    @property
    def held_out(self) -> bool:
        return "train" not in self.splits and not self.said


def load_rows(
    source: Source,
    *,
    split: str | Sequence[str] | None = None,
    limit: int | None = None,
    bad_rows: str = "error",
    name: str = "data",
) -> Rows:
    """Reads a data set into memory as a list of `Row`s (dicts that know their origin).

    Args:
      source: a .jsonl, .json, .csv, .tsv (also .gz, .bz2, .xz, .zst) or .parquet file;
        a directory of such files, or one that `datasets.save_to_disk` wrote; the URL of
        one of these (gs://, s3://: docs/remote.md); a hub id ("owner/name",
        "owner/name:config"); or several of these with commas between them. A split may
        stand behind each: "owner/name:config[test]", "folder[test]".
        Also rows in memory: a list of dicts, a `datasets.Dataset`, or a mapping from
        the names of splits to these.
      split: which split of a hub data set, or of a directory whose file or folder names
        name splits: one name, or several in order of preference (`HELD_OUT`). None is
        "train". What has no splits is taken whole, and is an error if one was named.
      limit: keep the first `limit` rows.
      bad_rows: "error" raises on lines that cannot be read; "skip" drops them, and
        `Rows.bad` keeps what was wrong (the example makers count it).
      name: what to call rows in memory: row 7 of them is "NAME row 7".

    Raises:
      FileNotFoundError: a local source does not exist.
      ValueError: nothing to read, or unreadable rows, by file, row and reason.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    rows, bad = [], []
    for text, part in _opened(source, split, name):
        before = len(rows)
        for row in part.rows:
            (bad if isinstance(row, BadRow) else rows).append(row)
            if limit is not None and len(rows) >= limit:
                break
        which = f"split {part.split!r}" if part.split else "all of it"
        logger.info("%s: %s, %d rows", text, which, len(rows) - before)
        if limit is not None and len(rows) >= limit:
            break
    if not rows and not bad:
        raise ValueError(f"{text}: there are no rows in it")
    settle(bad, len(rows) + len(bad), bad_rows)
    return Rows(rows, bad)


def _opened(source: Source, split: Any, name: str) -> Iterator[tuple[str, _Part]]:
    """(what to call it, its rows), one after the other."""
    if isinstance(source, str | Path):
        for text in _parts(source):
            yield text, _open(*_asked(text, split))
    else:
        yield name, _open_given(source, name, _asked("", split)[1])


def _open_given(given: Any, name: str, asked: _Asked) -> _Part:
    """Rows in memory."""
    if isinstance(given, Mapping):
        split = _choose(name, sorted(map(str, given)), asked)
        part = _open_given(given[split], f"{name}[{split}]", _Asked(("train",), False))
        return part._replace(split=split)
    if isinstance(given, list | tuple):
        _check_unsplit(name, set(), asked)
        return _Part(None, listed_rows(given, name))
    if hasattr(given, "column_names") and hasattr(given, "__len__"):
        # Both halves of a train_test_split say "train": that alone is no warning.
        said = asked.said and getattr(given, "split", None)
        _check_unsplit(name, {str(said)} if said else set(), asked)
        return _Part(None, dataset_rows(given, name))
    raise ValueError(
        f"{name} is a {type(given).__name__}: expected a file, a directory, a hub id, "
        "a list of dicts, a datasets.Dataset or a mapping of splits of them (list(...) "
        "of what is iterated over, .to_dict('records') of a data frame)"
    )


def _parts(source: str | Path) -> list[str]:
    text = str(source)
    if located(text).exists():  # a file name may hold a comma
        return [text]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("the data source is empty")
    return parts


def _asked(text: str, split: str | Sequence[str] | None) -> tuple[str, _Asked]:
    """The source without its "[split]", and which split is meant."""
    match = None if located(text).exists() else re.fullmatch(r"([^\[]+)\[(.+)\]", text)
    if not match:
        if isinstance(split, str):
            return text, _Asked((split,), True)
        return text, _Asked(tuple(split or ("train",)), False)
    if isinstance(split, str) and split != match[2]:
        raise ValueError(f"{text}: split {split!r} is asked for as well; drop one")
    return match[1], _Asked((match[2],), True)


def _open(source: str, asked: _Asked) -> _Part:
    path = located(source).expanduser()
    if path.is_dir():
        return _open_directory(path, asked)
    if path.is_file():
        _check_unsplit(path, named_splits(path.stem), asked)
        return _Part(None, read_file(path))
    local = path.is_absolute() or source.startswith((".", "~"))
    if local or is_url(source) or is_data_file(path):
        raise FileNotFoundError(f"{source}: there is no such file or directory")
    return _open_hub(source, asked)


def _check_unsplit(path: Path | str, own: set[str], asked: _Asked) -> None:
    """Of what has no splits: refuses another split, warns of measuring on "train"."""
    split = asked.splits[0]
    if asked.said and canonical(split) not in (own or {"train"}):
        which = f"is named {' and '.join(sorted(own))}" if own else "has no splits"
        raise ValueError(
            f"{path}: split {split!r} is asked for, but it {which}; name another "
            "source, or leave the split out to read all of it"
        )
    if asked.held_out and own == {"train"}:
        logger.warning("%s: held-out rows are read from what is named train", path)


def _open_directory(path: Path, asked: _Asked) -> _Part:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, asked)
    found = [
        file
        for file in files_below(path)
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name not in _DESCRIPTIONS
        and file.suffix != ".md"
    ]
    files = [file for file in found if is_data_file(file)]
    unread = [file for file in found if not is_data_file(file)]
    if not files:
        listed = f"; it holds {_listed(path, unread)}" if unread else ""
        raise ValueError(f"{path}: holds no file of a known kind ({KNOWN}){listed}")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        name = split_of(file.relative_to(path), [*map(canonical, asked.splits)])
        by_split.setdefault(name, []).append(file)
    split = None
    if set(by_split) == {None}:
        _check_unsplit(path, named_splits(path.name), asked)
    else:
        splits = sorted(name for name in by_split if name)
        unread += by_split.get(None, [])
        split = _choose(path, splits, asked, f" among {_listed(path, files)}")
    if unread:
        logger.warning("%s: not read: %s", path, _listed(path, unread))
    _refuse_copies(path, by_split[split])
    return _Part(split, (row for file in by_split[split] for row in read_file(file)))


def _refuse_copies(path: Path, files: list[Path]) -> None:
    """Refuses one file twice, as it is and compressed."""
    first: dict[Path, Path] = {}
    for file in files:
        same = first.setdefault(file.with_name(uncompressed_name(file)), file)
        if same != file:
            raise ValueError(
                f"{path}: {_listed(path, [same, file])} are one file, compressed in "
                "different ways: its rows would be read twice; delete one of them"
            )


def _listed(path: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(path)) for file in files]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _choose(source: Any, splits: list[str], asked: _Asked, files: str = "") -> str:
    """The first split asked for that there is, whatever it is called there."""
    known = {canonical(name): name for name in splits} | {name: name for name in splits}
    for split in asked.splits:
        if (name := known.get(split) or known.get(canonical(split))) is not None:
            return name
    wanted = " or ".join(map(repr, asked.splits))
    kind = "file for split" if files else "split"
    raise ValueError(
        f"{source}: no {kind} {wanted}{files}; the splits are {', '.join(splits)}: "
        + _ADVICE
    )


def _open_saved(path: Path, asked: _Asked) -> _Part:
    import datasets

    data, split = datasets.load_from_disk(str(path)), None
    if isinstance(data, datasets.DatasetDict):
        split = _choose(path, sorted(map(str, data)), asked)
        data = data[split]
    else:
        own = named_splits(path.name) | ({str(data.split)} if data.split else set())
        _check_unsplit(path, own, asked)
    return _Part(split, dataset_rows(data, str(path)))


def _open_hub(source: str, asked: _Asked) -> _Part:
    import datasets

    name, _, config = source.partition(":")
    for split in asked.splits:
        try:
            data = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # network, missing, gated, script: many kinds
            unknown = str(error).startswith("Unknown split")
            if unknown and split != asked.splits[-1]:
                continue
            advice = f"; {_ADVICE}" if unknown else ""
            raise ValueError(
                f"{source}: neither a local file nor a data set that can be loaded "
                f"from the hub (split {' or '.join(map(repr, asked.splits))}): "
                f"{type(error).__name__}: {error}{advice}"
            ) from error
        return _Part(split, dataset_rows(data, f"{source}[{split}]"))
    raise AssertionError("a split is always asked for")
