"""Files of rows: JSONL, JSON, CSV, TSV, each also compressed, and Parquet; what their
names and those of their folders say of splits.

Text files are read by our own reader: `datasets` names a broken line relative to a
block, after 10 MB turns an object where a string was into a string, and makes numbers
and nulls of the texts of a CSV file ("007", "NA").
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from jalign.data.rows import BadRow, Row, parse_json
from jalign.paths import on_disk, open_to_read

_BOM = b"\xef\xbb\xbf"
_TEXT = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*_TEXT, ".parquet")
KNOWN = f"{', '.join(SUFFIXES)}; the text ones also with {', '.join(COMPRESSED)}"

_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
_CANONICAL = {word: name for name, words in _NAMES.items() for word in words}
# As `datasets` names what it pushes; the name of a split holds no other signs.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")

HELD_OUT = ("test", "validation")
"""For `load_rows(split=...)`: the first of these that there is, never "train"."""


def is_data_file(name: str | Path) -> bool:
    """Whether the name ends as those of the files that can be read."""
    path = PurePath(str(name))
    if path.suffix in COMPRESSED:
        return Path(path.stem).suffix in _TEXT
    return path.suffix in SUFFIXES


def uncompressed_name(path: Path) -> str:
    """The file's name without .gz and the like."""
    return path.stem if path.suffix in COMPRESSED else path.name


def base_name(path: Path) -> str:
    """The file's name without .jsonl, .csv.gz and the like."""
    return Path(uncompressed_name(path)).stem


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file, and what is wrong with lines that cannot be read.

    Raises: ValueError by file (and line) if all of it cannot be read; OSError.
    """
    if not is_data_file(path):
        raise ValueError(f"{path}: unknown kind of file; expected one of {KNOWN}")
    kind = path.suffix if path.suffix in SUFFIXES else Path(path.stem).suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with _opened(path) as file:
        if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
            raise ValueError(f"{path}: is UTF-16; save it as UTF-8")
        if kind == ".jsonl":
            yield from _read_jsonl(file, path)
        elif kind == ".json":
            yield from _read_json(file, path)
        else:
            yield from _read_csv(file, path, "," if kind == ".csv" else "\t")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; damage raises ValueError by file."""
    try:
        with contextlib.ExitStack() as stack:
            yield _open(path, stack)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be decompressed: {error}") from None
    except OSError as error:
        if error.errno is not None:  # of the disk, not of what is in the file
            raise
        raise ValueError(f"{path}: cannot be decompressed: {error}") from None


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    file: Any = stack.enter_context(open_to_read(path))
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if path.suffix == ".zst":  # the standard library has it from Python 3.14 on
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    elif path.suffix in openers:
        file = openers[path.suffix](file, "rb")
    return stack.enter_context(file)


def _read_jsonl(file: BinaryIO, path: Path) -> Iterator[Row | BadRow]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield _parse_line(line, f"{path} row {number}")


def _parse_line(line: bytes, origin: str) -> Row | BadRow:
    value, reason, _ = _parsed(line)
    if reason.startswith("broken JSON") and not line.endswith(b"\n"):
        reason += " (last line: is the file cut off?)"
    return BadRow(origin, "(line)", reason) if reason else _as_row(value, origin)


def _parsed(data: bytes) -> tuple[Any, str, int]:
    """A JSON value; or what is wrong, and in which line, 0 if that is not known."""
    try:
        return parse_json(data.decode("utf-8")), "", 0
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, f"invalid UTF-8 at byte {error.start + 1}", line
    except json.JSONDecodeError as error:
        reason = f"broken JSON at column {error.colno}: {error.msg}"
        return None, reason, error.lineno
    except RecursionError:
        return None, "JSON nested too deeply", 0
    except ValueError as error:  # a key twice, an integer of thousands of digits
        return None, str(error).partition(";")[0], 0


def _as_row(value: Any, origin: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, origin)
    return BadRow(origin, "(row)", f"is {type(value).__name__}, not an object")


def _read_json(file: BinaryIO, path: Path) -> Iterator[Row | BadRow]:
    """An array of objects; or, as many .json files are, one object a line."""
    data = file.read().removeprefix(_BOM)
    if not data.lstrip().startswith(b"["):
        yield from _read_jsonl(io.BytesIO(data), path)
        return
    values, reason, line = _parsed(data)
    if reason:
        where = f"{path} line {line}" if line else str(path)
        raise ValueError(f"{where}: {reason}")
    for number, value in enumerate(values, 1):
        yield _as_row(value, f"{path} row {number}")


def _read_csv(file: BinaryIO, path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    """Every field as the text that it is, an empty one as ""; rows by their line."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long answer
    text = io.TextIOWrapper(
        file,
        "utf-8-sig",
        errors="surrogateescape",  # so that only the row with the bad byte is bad
        newline="",
    )
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        origin = f"{path} row {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(origin, "(line)", f"broken CSV: {error}")
            continue
        if not header:
            header = fields
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: two columns of the header are called alike")
        elif fields:
            yield _csv_row(header, fields, origin)


def _csv_row(header: list[str], fields: list[str], origin: str) -> Row | BadRow:
    if len(fields) != len(header):
        reason = f"has {len(fields)} fields, the header {len(header)}"
        return BadRow(origin, "(line)", reason)
    for name, value in zip(header, fields, strict=True):
        if not value.isascii() and any("\udc80" <= c <= "\udcff" for c in value):
            return BadRow(origin, name, "invalid UTF-8")
    return Row(dict(zip(header, fields, strict=True)), origin)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import datasets

    with tempfile.TemporaryDirectory() as cache, on_disk(path) as here:
        try:
            data = datasets.Dataset.from_parquet(
                str(here), cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # pyarrow's and datasets' own kinds
            reason = str(error.__cause__ or error)
            raise ValueError(f"{path}: not a readable Parquet file: {reason}") from None
        yield from dataset_rows(data, str(path))


def dataset_rows(data: Any, name: str) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, as plain values whatever `set_format` says."""
    how = data.format
    if how["type"] not in (None, "custom"):  # "custom" is a transform of the user's
        kept = {"columns": how["columns"]}
        data = data.with_format(None, **(kept if not how["output_all_columns"] else {}))
    for number, row in enumerate(data, 1):
        yield Row(row, f"{name} row {number}")


def listed_rows(rows: Sequence[Any], name: str) -> Iterator[Row | BadRow]:
    """The rows of a list of dicts; those of `load_rows` keep their origin."""
    for number, row in enumerate(rows, 1):
        origin = getattr(row, "origin", f"{name} row {number}")
        if isinstance(row, dict) and not all(isinstance(key, str) for key in row):
            yield BadRow(origin, "(row)", "has a key that is no string")
        else:
            yield _as_row(row, origin)
    yield from getattr(rows, "bad", ())


def named_splits(name: str) -> set[str]:
    """The splits that the words of a name stand for: "x_train.v2" for {"train"}."""
    words = re.split(r"[^a-z]+", name.lower())
    return {_CANONICAL[word] for word in words if word in _CANONICAL}


def canonical(split: str) -> str:
    """ "val" and the like as the name that `datasets` uses; others as they are."""
    return _CANONICAL.get(split, split)


def split_of(file: Path, asked: Sequence[str] = ()) -> str | None:
    """The split of a file, of which the path below the source is given; None if it
    names none.

    Args:
      file: relative path; folders count as the file's own name does.
      asked: splits asked for: a name that is one of these is that one, whatever it
        is ("train_sft" is not a word of "train" then).

    Raises: ValueError if the path names several.
    """
    name = base_name(file)
    shard = _SHARD.fullmatch(name)
    if shard:
        last = re.split(r"[._]", shard[1])[-1]
        return shard[1] if shard[1] in asked else _CANONICAL.get(last, shard[1])
    parts = [*file.parent.parts, name]
    found = {part for part in parts if part in asked and part not in _CANONICAL}
    found = found or set().union(*map(named_splits, parts))
    if len(found) > 1:
        raise ValueError(
            f"{file}: its path names the splits {' and '.join(sorted(found))}; rename "
            "it, or give the files themselves, with commas between them"
        )
    return found.pop() if found else None
