"""A folder is there whole, as before, or not at all."""

import pytest

from jalign.train.stop import whole_folder


def write(target, weights, fail=False):
    with whole_folder(target) as folder:
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)
        if fail:
            raise KeyboardInterrupt
        (folder / "config.json").write_text("{}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        write(target, "1", fail=True)
    assert names(tmp_path) == []
    write(target, "1")
    (target / "README.md").write_text("mine")
    (target / "model-00001-of-00002.safetensors").write_text("of an older export")
    with pytest.raises(KeyboardInterrupt):
        write(target, "2", fail=True)
    assert (target / "model.safetensors").read_text() == "1"
    write(target, "2")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["README.md", "config.json", "model.safetensors"]
    assert (target / "model.safetensors").read_text() == "2"


def test_what_a_kill_has_left_is_removed(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "torn").write_text("")
    write(tmp_path / "model", "1")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]
