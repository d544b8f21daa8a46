"""Tests for jalign/data/files.py through `load_rows`: which split is read, and what
of a folder is not."""

import logging

import pytest

from jalign.data import HELD_OUT, load_rows

HF_NAMES = {"train": 2, "test": 3, "validation": 1}


@pytest.fixture
def tree(tmp_path):
    """Writes {path: tag} as one-row files; returns the folder."""

    def write(*files):
        for name in files:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{{"text": "{name}"}}\n')
        return tmp_path / "data"

    return write


def read(folder, split=None):
    return [row["text"] for row in load_rows(folder, split=split)]


FOLDERS = [
    ["train/0.jsonl", "test/0.jsonl", "validation/0.jsonl"],
    ["train.jsonl", "test/part-0.jsonl", "val.jsonl"],
    ["a/train/x.jsonl", "a/test/x.jsonl", "a/dev/x.jsonl"],
    ["x_train_v2.jsonl", "x-test.jsonl", "x.valid.jsonl"],
    [f"data/{s}-00000-of-00001.jsonl" for s in ("train", "test", "validation")],
]


@pytest.mark.parametrize("files", FOLDERS, ids=range(len(FOLDERS)))
def test_folders_and_file_names_name_splits(files, tree, caplog):
    folder = tree(*files)
    with caplog.at_level(logging.INFO, "jalign.data"):
        assert read(folder) == read(folder, "train") == files[:1]
        assert read(folder, "test") == read(f"{folder}[test]") == files[1:2]
        assert read(folder, "validation") == read(folder, "val") == files[2:]
        assert read(folder, HELD_OUT) == files[1:2]
    assert f"{folder}: split 'test', 1 rows" in caplog.text
    assert "not read" not in caplog.text
    (folder / files[1]).unlink()
    assert read(folder, HELD_OUT) == files[2:]
    (folder / files[2]).unlink()
    with pytest.raises(ValueError, match="no file for split 'test' or 'validation'"):
        load_rows(folder, split=HELD_OUT)


def test_other_names_of_splits_are_told_apart(tree):
    names = ("train_sft", "test_sft", "train_gen")
    folder = tree(*(f"data/{name}-00000-of-00001.jsonl" for name in names))
    assert read(folder, "train_sft") == ["data/train_sft-00000-of-00001.jsonl"]
    for split in (None, HELD_OUT):
        with pytest.raises(ValueError, match="splits are test_sft, train_gen, train_s"):
            load_rows(folder, split=split)
    assert read(tree("stage2.jsonl"), "stage2") == ["stage2.jsonl"]


@pytest.mark.parametrize("word", ["x-{}", "x_{}", "x.{}", "a-b.{}-v2", "{}"])
def test_shards_of_any_name_have_the_split_of_its_words(word, tree):
    names = [word.format(s) + "-00000-of-00002.jsonl" for s in ("train", "test")]
    folder = tree(*names)
    assert read(folder) == names[:1] and read(folder, HELD_OUT) == names[1:]
    assert read(folder, "test") == names[1:]


def test_a_file_beside_its_compressed_self_is_refused(tree):
    folder = tree("train.jsonl", "test.jsonl")
    (folder / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"train\.jsonl, train\.jsonl\.gz are one file"
    ):
        load_rows(folder)
    assert read(folder, "test") == ["test.jsonl"]  # these are not concerned


@pytest.mark.parametrize(
    "names", [("train/a.jsonl", "notes.jsonl"), ("train.jsonl", "b.txt", "c.zip")]
)
def test_what_is_not_read_is_named(names, tree, caplog):
    folder = tree(*names, "README.md", ".hidden/x.jsonl", "LICENSE")
    assert read(folder) == [names[0]]
    (message,) = [r.getMessage() for r in caplog.records]
    assert message == f"{folder}: not read: {', '.join(names[1:])}"


def test_nothing_that_can_be_read_names_what_is_there(tree):
    with pytest.raises(ValueError, match=r"holds no file of a known kind .* a\.arrow"):
        load_rows(tree("a.arrow"))


def test_a_path_that_names_two_splits_is_refused(tree):
    with pytest.raises(ValueError, match="train/x_test.jsonl: .* test and train"):
        load_rows(tree("train/x_test.jsonl", "test/y.jsonl"))


def test_a_split_that_is_not_there_is_never_another_one(tree):
    folder = tree("a.jsonl", "b.jsonl")
    assert read(folder) == read(folder, HELD_OUT) == ["a.jsonl", "b.jsonl"]
    for source in (folder, folder / "a.jsonl"):
        with pytest.raises(
            ValueError, match="'test' is asked for, but it has no splits"
        ):
            load_rows(source, split="test")
    with pytest.raises(ValueError, match="'test' is asked for, but it is named train"):
        load_rows(tree("my_train.jsonl") / "my_train.jsonl", split="test")
    with pytest.raises(ValueError, match="split 'train' is asked for as well"):
        load_rows(f"{folder}[test]", split="train")


def test_held_out_rows_of_what_is_named_train_are_warned_of(tree, caplog):
    folder = tree("train/a.jsonl", "test/a.jsonl")
    assert read(folder / "test", HELD_OUT) == ["test/a.jsonl"]
    assert not caplog.records
    assert read(folder / "train", HELD_OUT) == ["train/a.jsonl"]
    assert "held-out rows are read from what is named train" in caplog.text


def test_saved_data_sets(tmp_path, caplog):
    import datasets

    parts = {
        name: datasets.Dataset.from_list([{"text": name}] * n)
        for name, n in HF_NAMES.items()
    }
    folder = tmp_path / "saved"
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert len(load_rows(folder)) == 2 and len(load_rows(folder, split="test")) == 3
    assert len(load_rows(f"{folder}[validation]")) == 1
    assert len(load_rows(folder, split=HELD_OUT)) == 3
    with pytest.raises(ValueError, match="no split 'dpo'; the splits are test, train"):
        load_rows(folder, split="dpo")
    assert len(load_rows(folder / "test", split=HELD_OUT)) == 3
    assert not caplog.records
    assert len(load_rows(folder / "train", split=HELD_OUT)) == 2
    assert "what is named train" in caplog.text


def test_the_hub_is_asked_for_held_out_rows_and_never_for_train(monkeypatch, caplog):
    import datasets

    have = {"train", "validation"}

    def load(name, config, *, split):
        if split not in have:
            raise ValueError(f'Unknown split "{split}". Should be one of {have}.')
        return datasets.Dataset.from_list([{"text": f"{name} {config} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with caplog.at_level(logging.INFO, "jalign.data"):
        assert read("o/n", HELD_OUT) == ["o/n None validation"]
    assert "o/n: split 'validation', 1 rows" in caplog.text
    assert read("o/n:main[train]", HELD_OUT) == ["o/n main train"]
    have.add("train[:10]")
    assert read("o/n:main[train[:10]]") == ["o/n main train[:10]"]
    have.discard("validation")
    with pytest.raises(ValueError, match="split 'test' or 'validation'.*name one of"):
        load_rows("o/n", split=HELD_OUT)
