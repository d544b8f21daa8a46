"""Models, data, rewards and OUT behind a URL do what they do on the disk.

In memory://, which fsspec has in every process; real servers: scripts/remote_check.py.
"""

import gzip
import json
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jalign as ja
from jalign import cli, paths
from jalign.mirror import Mirror
from jalign.models.hf_files import WEIGHTS, WeightFiles
from jalign.models.peft_config import read_adapter_config
from jalign.rewards.functions import load_function
from jalign.rewards.sums import open_scorer
from jalign.train import step_folders
from jalign.train.checkpoint import Checkpointer
from jalign.train.evaluations import Callbacks
from jalign.train.run import lock_directory
from tests.models.tiny import CONFIGS, random_params
from tests.train import world

pytest.importorskip("upath")


@pytest.fixture
def url():
    """An empty folder in a store."""
    return f"memory://{uuid.uuid4().hex}"


def put(folder: Path, url: str) -> str:
    """Copies a folder there."""
    for file in paths.files_below(folder):
        name = file.relative_to(folder).as_posix()
        (paths.located(url) / name).write_bytes(file.read_bytes())
    return url


def contents(folder: str | Path) -> dict[str, bytes]:
    folder = paths.located(folder)
    start = len(str(folder)) + 1
    return {str(f)[start:]: f.read_bytes() for f in paths.files_below(folder)}


def error_of(function, *given, **how) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        function(*given, **how)
    return f"{type(error.value).__name__}: {error.value}"


def test_what_is_no_url_stays_as_it_is(tmp_path):
    for text in ("a/b", "~/x", "org/name:config", "x.jsonl[test]", "c:/x"):
        assert paths.located(text) == Path(text) and not paths.is_url(text)
    assert paths.located(tmp_path) is tmp_path or paths.located(tmp_path) == tmp_path
    assert paths.located(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    again = paths.located("memory://x/y")
    assert paths.located(again) is again and str(again) == "memory://x/y"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    said = error_of(paths.located, "az://x/y")
    assert "az://x/y: Install adlfs" in said and "jalign[remote]" in said
    monkeypatch.setitem(sys.modules, "upath", None)
    said = error_of(paths.located, "memory://x/y")
    assert said == (
        'ValueError: memory://x/y: To use URLs, pip install "jalign[remote]"'
    )
    assert "nix:// is not one of" in error_of(paths.located, "nix://x")


def test_a_store_that_cannot_be_reached_is_no_missing_file(monkeypatch):
    fs = paths.located("memory://x").fs

    def no_info(*_, **__):
        raise RuntimeError("wrong password")

    monkeypatch.setattr(type(fs), "info", no_info)
    said = error_of(ja.data.load_rows, "memory://x/y.jsonl")
    assert said.startswith("OSError: [Errno 5] cannot be reached: RuntimeError: wrong")
    assert "memory://x/y.jsonl" in said


@pytest.fixture
def asked(monkeypatch):
    """The sizes of all requests for parts of files."""
    from fsspec.implementations.memory import MemoryFileSystem

    real, found = MemoryFileSystem.cat_file, []

    def cat_file(self, path, start=None, end=None, **how):
        found.append(end - start)
        return real(self, path, start=start, end=end, **how)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return found


def test_only_what_is_asked_for_is_fetched(url, asked, monkeypatch):
    big = np.arange(1_000_000, dtype=np.float32).reshape(2000, 500)
    (file := paths.located(url) / WEIGHTS).fs.pipe_file(file.path, b"")
    one = np.asarray(np.float32(3.5))
    with paths.written(file) as here:
        save_file({"big": big, "one": one}, here)
    monkeypatch.setattr(paths, "_RANGE_BYTES", 6000)
    with WeightFiles(paths.located(url)) as files:
        assert not files.problems and files.shape("big") == (2000, 500)
        assert sum(asked) < 1000
        rows = files.read("big", (slice(1500, 1510),))
        np.testing.assert_array_equal(rows, big[1500:1510])
        assert asked[-4:] == [6000, 6000, 6000, 2000] and sum(asked) < 21_000
        part = files.read("big", (slice(5, 900), slice(3, 9)))
        np.testing.assert_array_equal(part, big[5:900, 3:9])
        assert files.read("one") == one and files.read("one").dtype == np.float32
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(OSError, match="memory://.* it changed"):
            files.read("big", (slice(1990, 2000),))


def test_a_mesh_fetches_every_byte_once(url, asked):
    """A device at a time would fetch a row that is cut eight times."""
    model = ja.models.Model(CONFIGS["llama"])
    ja.models.save(url, model, params := random_params(model))
    mesh = ja.sharding.make_mesh(fsdp=8)
    again = ja.models.load(url, mesh=mesh)[1]
    assert sum(asked) == len(contents(url)[WEIGHTS])
    jax.tree.map(np.testing.assert_array_equal, again, params)
    want = ja.sharding.param_shardings(mesh, model.param_shapes())
    assert jax.tree.map(lambda x: x.sharding, again) == want


@pytest.mark.parametrize("damage", ["short", "header", "length", "missing"])
def test_damaged_weights_are_said_as_on_the_disk(damage, url, tmp_path):
    save_file({"a": np.ones((4, 4), np.float32)}, tmp_path / WEIGHTS)
    data = (tmp_path / WEIGHTS).read_bytes()
    index = {"weight_map": {"a": WEIGHTS, "b": "gone.safetensors"}}
    changed = {
        "short": data[:-1],
        "header": data[:9] + b"}" + data[10:],
        "length": b"\xff" * 8 + data[8:],
    }
    (tmp_path / WEIGHTS).write_bytes(changed.get(damage, data))
    if damage == "missing":
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with (
        WeightFiles(tmp_path) as here,
        WeightFiles(put(tmp_path, url) and paths.located(url)) as there,
    ):
        assert here.problems == there.problems and here.problems


def test_rows_of_every_kind_of_file(url, tmp_path):
    import datasets
    import pyarrow

    rows = [{"prompt": f"p{i}", "completion": "é" * i} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("x,y\n1,2\n3,4\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "e.jsonl.zst"), "zstd") as out:
        out.write(lines.encode())
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "f.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "splits" / "test").mkdir(parents=True)
    (tmp_path / "splits" / "test" / "0.jsonl").write_text(lines)
    (tmp_path / "splits" / "train.jsonl").write_text(lines * 2)
    (tmp_path / "bad.jsonl").write_text(lines + '{"prompt": \n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-9])
    (tmp_path / "wrong.bin").write_text("")
    put(tmp_path, url)

    def read(base, source):
        load = ja.data.load_rows
        try:
            found = load(source.replace("BASE", str(base)))
        except (ValueError, OSError) as error:
            return type(error), str(error).replace(str(base), "BASE")
        return [(row, row.origin.replace(str(base), "BASE")) for row in found]

    sources = ["a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.jsonl.zst", "f.parquet"]
    sources += ["saved", "splits", "splits[test]", "splits[no]", "a.jsonl,BASE/c.csv"]
    sources += ["bad.jsonl", "torn.jsonl.gz", "wrong.bin", "none.jsonl"]
    for source in sources:
        here, there = (read(base, f"BASE/{source}") for base in (tmp_path, url))
        assert here == there, source
    assert len(read(url, "BASE/splits")) == 10 and len(read(url, "BASE/saved")) == 5
    assert "bad.jsonl row 6" in read(url, "BASE/bad.jsonl")[1]
    assert read(url, "BASE/none")[0] is FileNotFoundError, "nor on the hub"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


def test_a_model_with_its_tokenizer_goes_there_and_back(here, url, tmp_path):
    put(here / "model", f"{url}/model")
    model, params = ja.models.load(f"{url}/model")
    jax.tree.map(
        np.testing.assert_array_equal, params, ja.models.load(here / "model")[1]
    )
    tokenizer = ja.data.load_tokenizer(f"{url}/model")
    assert tokenizer.name_or_path == f"{url}/model"
    (paths.located(url) / "again" / "README.md").write_text("mine")
    (paths.located(url) / "again" / "model-00001-of-00009.safetensors").write_text("")
    given = model, params, tokenizer
    ja.models.save(f"{url}/again", *given, max_shard_size=20_000)
    ja.models.save(tmp_path / "again", *given, max_shard_size=20_000)
    there = contents(f"{url}/again")
    assert there.pop("README.md") == b"mine"
    assert there == contents(tmp_path / "again") and len(there) > 6
    assert "no such folder" in error_of(ja.models.load, f"{url}/none")
    said = error_of(ja.data.load_tokenizer, f"{url}/none")
    assert f"{url}/none: no tokenizer can be loaded" in said and "/tmp" not in said


def test_plan_and_its_flags(here, url):
    put(here / "model", f"{url}/model")
    (paths.located(url) / "plan.yaml").write_text(f"model: {url}/model\n")
    words = ["--config", f"{url}/plan.yaml", "--mesh", "fsdp=8"]
    assert world.quietly(["plan", "sft", *words, "--json", f"{url}/plan.json"]) == 0
    told = json.loads(contents(url)["plan.json"])
    local = ja.plan.plan("sft", model=str(here / "model"), mesh="fsdp=8")
    assert told["total"] == local.total
    said = error_of(ja.plan.plan, "sft", model=f"{url}/none")
    assert said == f"FileNotFoundError: model '{url}/none': no config.json there"


def test_a_save_that_fails_is_no_model(url, monkeypatch):
    model = ja.models.Model(CONFIGS["llama"])
    params = random_params(model)
    ja.models.save(url, model, params)

    def no_upload(file, target):
        raise OSError("the store is full")

    monkeypatch.setattr(paths, "upload", no_upload)
    assert "the store is full" in error_of(ja.models.save, url, model, params)
    assert "config.json" not in contents(url)


def test_an_adapter_finds_its_base_beside_it(url):
    put_text = lambda name, text: (paths.located(url) / name).write_text(text)  # noqa: E731
    put_text("base/config.json", "{}")
    names = {"../base": f"{url}/base", "memory://b": "memory://b", "org/x": "org/x"}
    for named, found in names.items():
        raw = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": named}
        raw |= {"target_modules": ["q_proj"]}
        put_text("adapter/adapter_config.json", json.dumps(raw))
        told = read_adapter_config(paths.located(f"{url}/adapter"))
        assert told.base() == found


def test_rewards(here, url):
    put(here, url)
    reward = load_function(f"{url}/reward.py:share_of_a")
    local = load_function(f"{here}/reward.py:share_of_a")
    rows = [{"prompt": "b"}] * 2
    given = ["b", "b"], ["a a", "b a"], rows
    np.testing.assert_array_equal(reward(*given), local(*given))
    assert f"no file {url}/x.py" in error_of(load_function, f"{url}/x.py:f")
    assert "is no reward model" in error_of(open_scorer, f"{url}/model")


def tree(value=1.0):
    return {"w": value + jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(7)}


def test_checkpoints_keep_fall_back_and_are_never_torn(url, monkeypatch, caplog):
    checkpointer = Checkpointer(f"{url}/checkpoints", keep=2)
    assert checkpointer.restore(jax.eval_shape(tree)) is None
    for step in (1, 2, 3):
        checkpointer.save(step, tree(step), {"step": step})
    checkpointer.close()
    folder = paths.located(f"{url}/checkpoints")
    (folder / "4" / "state" / "torn").write_text("by a kill")
    checkpointer = Checkpointer(folder)
    assert checkpointer.steps() == [2, 3] and not (folder / "4").exists()
    restored = checkpointer.restore(jax.eval_shape(tree))
    assert restored.step == 3 and restored.meta == {"step": 3}
    np.testing.assert_array_equal(restored.tree["w"], tree(3)["w"])
    with monkeypatch.context() as patch:

        def gone(*_, **__):
            raise RuntimeError("the network is gone")

        patch.setattr(type(folder.fs), "cat_file", gone)
        patch.setattr(type(folder.fs), "_open", gone)
        said = error_of(checkpointer.peek)
        assert said.startswith("OSError") and "the network is gone" in said
    assert checkpointer.steps() == [2, 3], "that is no damage"
    record = folder / "3" / "meta" / "metadata"
    record.write_bytes(record.read_bytes().replace(b'"step": 3', b'"step": 9'))
    assert checkpointer.restore(jax.eval_shape(tree)).step == 2
    assert "falling back to step 2" in caplog.text
    assert (folder / "3.corrupt").is_dir() and checkpointer.steps() == [2]
    counted = []
    monkeypatch.setattr(
        step_folders, "upload", lambda *_: counted.append(checkpointer.steps())
    )
    checkpointer.save(2, tree(9), {})
    checkpointer.close()
    assert counted and not any(counted), "while it is replaced it does not count"


def test_two_runs_in_one_store_are_told_of_each_other(url, caplog):
    out = paths.located(url)
    with lock_directory(out):
        assert not caplog.records
        with lock_directory(out):
            assert f"{url}: a run (process" in caplog.text
    assert contents(url) == {}


def test_a_mirror_brings_what_has_changed_and_loses_nothing(url, monkeypatch, caplog):
    mirror, sent = Mirror(paths.located(url)), []
    real = paths.upload

    def upload(file, target):
        sent.append(file.name)
        if "full" in sent:
            raise OSError("full")
        real(file, target)

    monkeypatch.setattr("jalign.mirror.upload", upload)
    (mirror.path / "a").write_text("1")
    (mirror.path / "b").write_text("1")
    mirror.try_push(now=True)
    with (mirror.path / "a").open("a") as file:
        file.write("2")
    mirror.try_push()
    assert sent == ["a", "b"], "not so soon again"
    mirror.push()
    assert sent == ["a", "b", "a"] and contents(url) == {"a": b"12", "b": b"1"}
    (mirror.path / "b").write_text("34")
    sent.append("full")
    mirror.try_push(now=True)
    mirror.try_push(now=True)
    mirror.close()
    assert caplog.text.count("full; kept in") == 1
    assert (mirror.path / "b").read_text() == "34"
    shutil.rmtree(mirror.path)


class Died(BaseException):
    pass


def test_a_run_that_died_goes_on_to_what_the_disk_has(here, url, tmp_path, monkeypatch):
    put(here, url)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = ("--steps", "4", "--checkpoint-every", "2")
    assert world.run("dpo", here, tmp_path / "out", *flags) == 0
    words = [
        word.replace(str(here), url)
        for word in world.words("dpo", here, here / "out", *flags)
    ]

    def die(step, row):
        if step == 3:
            raise Died

    with pytest.raises(Died):
        cli.main(words, callbacks=Callbacks(on_step=die))
    # As of a kill: the rows of the checkpoint are there.
    assert len(contents(f"{url}/out")["metrics.jsonl"].splitlines()) == 2
    assert world.quietly(words) == 0
    local, there = contents(tmp_path / "out"), contents(f"{url}/out")
    assert {n for n in there if not n.startswith(("checkpoints", "tensorboard"))} == {
        n for n in local if not n.startswith(("checkpoints", "tensorboard", ".lock"))
    }
    for name in local:
        if name.startswith("model/") or name == "reference.npz":
            assert local[name] == there[name], name
    rows = [
        [json.loads(line) for line in out["metrics.jsonl"].splitlines()]
        for out in (local, there)
    ]
    for row in (*rows[0], *rows[1]):
        del row["step_time"], row["tokens_per_second"]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert sum("events.out" in name for name in there) == 2
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints")}
    assert steps == {"2", "4"}
