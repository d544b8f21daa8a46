"""Rows from JSONL, JSON and Parquet files, directories and the Hugging Face hub.

JSONL and JSON are read by our own reader: `datasets` names a broken line relative to
a block, and after 10 MB turns an object where a string was into a string.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jalign.data.rows import BadRow, Row, Rows, settle

SUFFIXES = (".jsonl", ".json", ".parquet")
_BOM = b"\xef\xbb\xbf"
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
}
_ALL_SPLIT_NAMES = {name for names in _SPLIT_NAMES.values() for name in names}


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    bad_rows: str = "error",
) -> Rows:
    """Reads a data set into memory as a list of `Row`s (dicts that know their origin).

    Args:
      source: a .jsonl, .json or .parquet file; a directory of such files, or one that
        `datasets.save_to_disk` wrote; a hub id ("owner/name", "owner/name:config");
        or several of these with commas between them.
      split: which split of a hub data set, or of a directory whose file names name
        splits. A single file is taken whole.
      limit: keep the first `limit` rows.
      bad_rows: "error" raises on lines that cannot be read; "skip" drops them, and
        `Rows.bad` keeps what was wrong (the example makers count it).

    Raises:
      FileNotFoundError: a local source does not exist.
      ValueError: nothing to read, or unreadable rows, by file, row and reason.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    rows, bad = [], []
    for part in _parts(source):
        for row in _read(part, split):
            (bad if isinstance(row, BadRow) else rows).append(row)
            if limit is not None and len(rows) >= limit:
                break
        if limit is not None and len(rows) >= limit:
            break
    if not rows and not bad:
        raise ValueError(f"{source}: there are no rows in it")
    settle(bad, len(rows) + len(bad), bad_rows)
    return Rows(rows, bad)


def _parts(source: str | Path) -> list[str]:
    text = str(source)
    if Path(text).exists():  # a file name may hold a comma
        return [text]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("the data source is empty")
    return parts


def _read(source: str, split: str) -> Iterator[Row | BadRow]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _read_directory(path, split)
    elif path.is_file():
        yield from _read_file(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"{source}: there is no such file or directory")
    else:
        yield from _read_hub(source, split)


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: unknown kind of file; expected one of {known}")


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _refuse_utf16(line, path)
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse_line(line, f"{path} row {number}")


def _refuse_utf16(start: bytes, path: Path) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: is UTF-16; save it as UTF-8")


def _parse_line(line: bytes, origin: str) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(origin, "(line)", f"invalid UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        where = f"broken JSON at column {error.colno}: {error.msg}"
        cut = "" if line.endswith(b"\n") else " (last line: is the file cut off?)"
        return BadRow(origin, "(line)", where + cut)
    except RecursionError:
        return BadRow(origin, "(line)", "JSON nested too deeply")
    return _as_row(value, origin)


def _as_row(value: Any, origin: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, origin)
    return BadRow(origin, "(row)", f"is {type(value).__name__}, not an object")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """An array of objects; or, as many .json files are, one object a line."""
    data = path.read_bytes()
    _refuse_utf16(data[:2], path)
    data = data.removeprefix(_BOM)
    if not data.lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line}: invalid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    for number, value in enumerate(values, 1):
        yield _as_row(value, f"{path} row {number}")


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            data = datasets.Dataset.from_parquet(
                str(path), cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # pyarrow's and datasets' own kinds
            reason = str(error.__cause__ or error)
            raise ValueError(f"{path}: not a readable Parquet file: {reason}") from None
        yield from _dataset_rows(data, str(path))


def _dataset_rows(data: Any, name: str) -> Iterator[Row]:
    for number, row in enumerate(data, 1):
        yield Row(row, f"{name} row {number}")


def _read_directory(path: Path, split: str) -> Iterator[Row | BadRow]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _read_saved(path, split)
        return
    for file in _files_of_split(path, split):
        yield from _read_file(file)


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{path}: no split {split!r}; it has {sorted(data)}")
        data = data[split]
    yield from _dataset_rows(data, str(path))


def _files_of_split(path: Path, split: str) -> list[Path]:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES
        and file.name not in ("dataset_info.json", "dataset_infos.json")
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"{path}: holds no {', '.join(SUFFIXES)} file")
    words = {file: set(re.split(r"[^a-z]+", file.stem.lower())) for file in files}
    if not any(found & _ALL_SPLIT_NAMES for found in words.values()):
        return files
    names = set(_SPLIT_NAMES.get(split, (split,)))
    chosen = [file for file in files if words[file] & names]
    if not chosen:
        listed = ", ".join(file.name for file in files[:10])
        raise ValueError(f"{path}: no file for split {split!r} among {listed}")
    return chosen


def _read_hub(source: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # network, missing, gated, script: many kinds
        raise ValueError(
            f"{source}: neither a local file nor a data set that can be loaded from "
            f"the hub (split {split!r}): {type(error).__name__}: {error}"
        ) from error
    yield from _dataset_rows(data, f"{source}[{split}]")
