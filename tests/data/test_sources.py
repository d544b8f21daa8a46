"""Tests for jalign/data/sources.py."""

import json

import pytest

from jalign.data.sources import load_rows


def test_rows_know_their_file_and_line(write_jsonl):
    path = write_jsonl([{"text": "a"}, {"text": "b"}])
    rows = load_rows(path)
    assert rows == [{"text": "a"}, {"text": "b"}]
    assert rows[1].origin == f"{path} row 2"


def test_bom_crlf_blank_lines_and_missing_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\r\n{"text": "b\\r"}')
    rows = load_rows(path)
    assert rows == [{"text": "é"}, {"text": "b\r"}]
    assert rows[1].origin.endswith("row 3")  # the line, blank lines counted


BROKEN = {
    b'{"text": "\xff"}\n': "row 2, field '(line)': invalid UTF-8 at byte 11",
    b'{"text": }\n': "row 2, field '(line)': broken JSON at column 10",
    b'{"text": "cut': "is the file cut off",
    b'["text"]\n': "row 2, field '(row)': is list, not an object",
    b"[" * 100_000 + b"\n": "nested too deeply",
}


@pytest.mark.parametrize("line", BROKEN, ids=[*range(len(BROKEN))])
def test_broken_lines_are_named_or_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match="1 of 2 rows") as error:
        load_rows(path)
    assert str(path) in str(error.value) and BROKEN[line] in str(error.value)
    rows = load_rows(path, bad_rows="skip")
    assert len(rows) == 1 and len(rows.bad) == 1


def test_a_late_schema_change_is_never_coerced(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for _ in range(12):  # `datasets` turns the object into a string after 10 MB
            file.write(json.dumps({"text": "x" * 1_000_000}) + "\n")
        file.write('{"text": {"a": 1}}\n')
    assert load_rows(path)[-1] == {"text": {"a": 1}}


def test_json_array_and_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[{"text": "a"},\n {"text": "b"}]')
    assert load_rows(path) == [{"text": "a"}, {"text": "b"}]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_rows(path) == [{"text": "a"}, {"text": "b"}]
    path.write_text('[{"text": "a"},\n {"text" "b"}]')
    with pytest.raises(ValueError, match="a.json line 2"):
        load_rows(path)


def test_parquet_and_saved_dataset(tmp_path):
    import datasets

    data = datasets.Dataset.from_list([{"prompt": "a", "n": i} for i in range(3)])
    data.to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet")[2] == {"prompt": "a", "n": 2}
    data.save_to_disk(tmp_path / "saved")
    assert len(load_rows(tmp_path / "saved")) == 3
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="bad.parquet: not a readable Parquet"):
        load_rows(tmp_path / "bad.parquet")


def test_directory_takes_the_files_of_the_split(write_jsonl, tmp_path):
    write_jsonl([{"text": "1"}], "x_train_0.jsonl")
    write_jsonl([{"text": "2"}], "x_train_1.jsonl")
    write_jsonl([{"text": "3"}], "x_test.jsonl")
    assert [r["text"] for r in load_rows(tmp_path)] == ["1", "2"]
    assert [r["text"] for r in load_rows(tmp_path, split="test")] == ["3"]
    with pytest.raises(ValueError, match="no file for split 'validation'"):
        load_rows(tmp_path, split="validation")


def test_several_sources_and_limit(write_jsonl):
    a = write_jsonl([{"text": "1"}, {"text": "2"}], "a.jsonl")
    b = write_jsonl([{"text": "3"}], "b.jsonl")
    assert len(load_rows(f"{a}, {b}")) == 3
    assert len(load_rows(f"{a},{b}", limit=2)) == 2
    comma = write_jsonl([{"text": "4"}], "c,d.jsonl")
    assert len(load_rows(str(comma))) == 1


def test_missing_empty_unknown_and_utf16(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl: there are no rows"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "a.xls").write_text("a,b")
    with pytest.raises(ValueError, match="unknown kind of file"):
        load_rows(tmp_path / "a.xls")
    (tmp_path / "w.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        load_rows(tmp_path / "w.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        load_rows(tmp_path / "folder")


def test_hub_names_go_to_datasets(monkeypatch):
    import datasets

    calls = []

    def load(name, config, *, split):
        calls.append((name, config, split))
        if name == "owner/none":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("owner/name:main", split="test[:1]")
    assert calls == [("owner/name", "main", "test[:1]")]
    assert rows[0].origin == "owner/name:main[test[:1]] row 1"
    with pytest.raises(ValueError, match="owner/none: neither a local file"):
        load_rows("owner/none")


def test_real_files(real_data):
    assert len(load_rows(real_data / "gsm8k_train.jsonl")) == 7473
    assert len(load_rows(real_data / "alpaca_eval_preferences_test.jsonl")) == 320


ROWS = [{"text": "a"}, {"text": "b", "n": 1}]


def test_rows_in_memory_are_rows_of_a_name():
    import datasets

    table = datasets.Dataset.from_list(
        [{"text": "a", "x": [1]}, {"text": "b", "x": []}]
    )
    for given in (table, table.with_format("numpy"), table.with_format("arrow")):
        assert load_rows(given) == [{"text": "a", "x": [1]}, {"text": "b", "x": []}]
    assert load_rows(table.with_format("numpy", columns=["text"])) == [
        {"text": "a"},
        {"text": "b"},
    ]
    shouted = table.with_transform(
        lambda batch: {"text": [t * 2 for t in batch["text"]]}
    )
    assert load_rows(shouted) == [{"text": "aa"}, {"text": "bb"}]
    rows = load_rows(ROWS, name="eval_data")
    assert rows == ROWS and rows[1].origin == "eval_data row 2"
    assert load_rows(tuple(ROWS), limit=1) == ROWS[:1]
    # Rows that were read keep their place, and what could not be read is still known.
    assert load_rows(rows[1:])[0].origin == "eval_data row 2"
    bad = load_rows([*ROWS, "c", {1: "d"}], bad_rows="skip")
    assert load_rows(bad, bad_rows="skip").bad == bad.bad


def test_splits_in_memory(caplog):
    import datasets

    splits = {"train": ROWS[:1], "val": ROWS[1:]}
    given = datasets.DatasetDict(
        {k: datasets.Dataset.from_list(v) for k, v in splits.items()}
    )
    for source in (splits, given):
        assert load_rows(source) == ROWS[:1]
        held_out = load_rows(source, split=("test", "validation"))
        assert held_out == ROWS[1:] and held_out[0].origin == "data[val] row 1"
        with pytest.raises(
            ValueError, match="data: no split 'x'; the splits are train, val"
        ):
            load_rows(source, split="x")
    halves = datasets.Dataset.from_list(ROWS * 4, split="train").train_test_split(0.5)
    assert len(load_rows(halves["test"], split=("test", "validation"))) == 4
    assert not caplog.records
    for source in (ROWS, halves["test"]):
        with pytest.raises(ValueError, match="data: split 'test' is asked for"):
            load_rows(source, split="test")


class Frame:
    columns = ["text"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data: there are no rows"),
        ([*ROWS, "c"], "data row 3, field '.row.': is str, not an object"),
        ([*ROWS, {1: "c"}], "data row 3, field '.row.': has a key that is no string"),
        (iter(ROWS), "data is a list_iterator: .*list.of dicts|list of dicts"),
        (Frame(), "data is a Frame: .*to_dict"),
        (None, "data is a NoneType"),
    ],
)
def test_what_is_not_rows_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_rows(given)
