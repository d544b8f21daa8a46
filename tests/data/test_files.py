"""Tests for jalign/data/files.py: CSV and compressed files; more in test_sources."""

import bz2
import gzip
import json
import lzma

import pytest

from jalign.data import load_rows
from jalign.data.messages import template_args
from jalign.data.rows import RowError

ROWS = [{"text": "é\n1"}, {"text": "007"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zst(data):
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


CODECS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", CODECS)
def test_compressed_files_are_read_by_line(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(CODECS[suffix](LINES + b"{\n"))
    rows = load_rows(path, bad_rows="skip")
    assert rows == ROWS and rows[1].origin == f"{path} row 2"
    assert rows.bad[0].origin == f"{path} row 3"
    array = tmp_path / f"a.json{suffix}"
    array.write_bytes(CODECS[suffix](json.dumps(ROWS).encode()))
    assert load_rows(array) == ROWS
    damaged = tmp_path / f"b.jsonl{suffix}"
    for wrong in (CODECS[suffix](LINES * 9)[:-12], b"no such thing, but long enough"):
        damaged.write_bytes(wrong)
        with pytest.raises(ValueError, match="b.jsonl.*: cannot be decompressed"):
            load_rows(damaged)


def test_a_key_that_an_object_has_twice_is_named(write_jsonl, tmp_path):
    path = write_jsonl([{"text": "a"}])
    with path.open("a") as file:
        file.write('{"text": "b", "text": "c"}\n{"messages": [{"role": 1, "role": 2}]}')
    rows = load_rows(path, bad_rows="skip")
    assert rows == [{"text": "a"}]
    assert [(bad.origin, bad.reason) for bad in rows.bad] == [
        (f"{path} row 2", "an object has the key 'text' twice"),
        (f"{path} row 3", "an object has the key 'role' twice"),
    ]
    array = tmp_path / "a.json"
    array.write_text('[{"text": "b", "text": "c"}]')
    with pytest.raises(ValueError, match="a.json: an object has the key 'text' twice"):
        load_rows(array)
    with pytest.raises(RowError, match="'tools': broken JSON: .* key 'a' twice"):
        template_args({"tools": '[{"a": 1, "a": 2}]'})


def test_csv_is_text_as_it_stands(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,completion\r\nq,007\r\n"
        b'"a ""b"", c\nd",NA\r\n\r\nx,\xc3\xa9\r\n'
    )
    rows = load_rows(path)
    assert rows == [
        {"prompt": "q", "completion": "007"},
        {"prompt": 'a "b", c\nd', "completion": "NA"},
        {"prompt": "x", "completion": "é"},
    ]
    assert [row.origin for row in rows] == [f"{path} row {n}" for n in (2, 3, 6)]
    long = tmp_path / "b.tsv"
    long.write_text("text\tn\n" + "x" * 200_000 + "\t1\n")
    assert load_rows(long) == [{"text": "x" * 200_000, "n": "1"}]


BROKEN = {
    b"a,b,c\n": "row 3, field '(line)': has 3 fields, the header 2",
    b"a\n": "row 3, field '(line)': has 1 fields, the header 2",
    b'"a"b,c\n': "row 3, field '(line)': broken CSV",
    b"a,\xff\n": "row 3, field 'y': invalid UTF-8",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_lines_of_csv_are_named_or_skipped(line, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n1,2\n" + line + b"3,4\n")
    with pytest.raises(ValueError, match="1 of 3 rows") as error:
        load_rows(path)
    assert BROKEN[line] in str(error.value)
    assert [row["x"] for row in load_rows(path, bad_rows="skip")] == ["1", "3"]


def test_csv_that_cannot_be_read_at_all(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,x\n1,2\n")
    with pytest.raises(ValueError, match="two columns of the header"):
        load_rows(path)
    path.write_text("x,y\n")
    with pytest.raises(ValueError, match="no rows"):
        load_rows(path)
    path.write_bytes("x,y\n1,2\n".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        load_rows(path)
    path.write_text('x,y\n1,"2\n')  # cut off inside a field
    with pytest.raises(ValueError, match="row 2, .*broken CSV: unexpected end"):
        load_rows(path)
