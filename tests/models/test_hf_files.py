"""Tests for jalign/models/hf_files.py: which files are opened."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jalign.models import hf_files
from jalign.models.hf_files import INDEX, WEIGHTS, WeightFiles, model_folder

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(folder, weight_map, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_reads_slices_across_files(tmp_path):
    write(
        tmp_path,
        {"a": "x.safetensors", "b": "y.safetensors"},
        x={"a": A},
        y={"b": A + 1},
    )
    with WeightFiles(tmp_path) as files:
        assert not files.problems and list(files) == ["a", "b"]
        assert files.shape("a") == (2, 3) and files.dtype("a") == "F32"
        part = files.read("b", (slice(1, 2), slice(0, 2)))
    np.testing.assert_array_equal(part, (A + 1)[1:2, :2])


def bytes_read() -> int:
    """By this process, as the kernel counts."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar:"))


def test_a_part_is_read_without_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "_CHUNK_BYTES", 3 * 4 * 500)  # of three rows
    big = np.arange(1_000_000, dtype=np.float32).reshape(2000, 500)
    one = np.float32(3.5)
    save_file({"first": A, "big": big, "one": np.asarray(one)}, tmp_path / WEIGHTS)
    with WeightFiles(tmp_path) as files:
        files.rename(lambda name: f"x.{name}")
        before = bytes_read() if Path("/proc/self/io").exists() else None
        rows = files.read("x.big", (slice(1500, 1510),))
        assert before is None or bytes_read() - before < 100_000
        np.testing.assert_array_equal(rows, big[1500:1510])
        for index in (
            (),
            (slice(7, 7),),
            (slice(None), slice(3, 9)),
            (slice(5, 9),) * 2,
        ):
            np.testing.assert_array_equal(files.read("x.big", index), big[index])
        assert files.read("x.one") == one
        os.truncate(tmp_path / WEIGHTS, 5_000)
        with pytest.raises(OSError, match=f"{WEIGHTS} ends before x.big does"):
            files.read("x.big", (slice(1990, 2000),))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin"])
def test_files_outside_of_the_folder_are_never_opened(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": A}, tmp_path / "x.safetensors")
    write(inner, {"a": name})
    with WeightFiles(inner) as files:
        assert "outside" in files.problems[0] and "a" not in files


def test_link_that_leads_outside_is_refused_but_the_hub_cache_is_not(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": A}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(blobs / "0123")
    with WeightFiles(snapshot) as files:
        assert not files.problems and "a" in files
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(blobs / "0123")
    with WeightFiles(other) as files:
        assert "outside" in files.problems[0]


def test_damage_duplicates_and_index_errors_are_problems(tmp_path):
    names = {"a": "x.safetensors", "c": "x.safetensors", "d": "z.safetensors"}
    write(tmp_path, names | {"e": "w.safetensors"}, x={"a": A}, w={"a": A, "e": A})
    (tmp_path / "z.safetensors").write_bytes(b"\xff" * 20)
    with WeightFiles(tmp_path) as files:
        text = "\n".join(files.problems)
    assert "damaged" in text and "duplicate tensor a" in text


@pytest.mark.parametrize("weight_map", [[], {}, "x", None], ids=str)
def test_an_index_that_maps_nothing_is_refused(tmp_path, weight_map):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"{INDEX}: not a"), WeightFiles(tmp_path):
        pass


def test_a_flood_of_a_header_is_not_read(tmp_path):
    size = 90 * 2**20
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(size.to_bytes(8, "little") + b"{}")
        file.truncate(size + 8)
    with WeightFiles(tmp_path) as files:
        assert "a header of 94371840 bytes" in files.problems[0]


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model_folder(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither"), WeightFiles(tmp_path):
        pass
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"), WeightFiles(tmp_path):
        pass
