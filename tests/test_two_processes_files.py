"""Two processes that read a checkpoint to one mesh, and write one."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jalign.models import Model, load, load_adapter, lora, save
from jalign.train.stop import whole_folder
from tests.models.tiny import CONFIGS, FAMILY_CONFIGS, random_params
from tests.sharding import processes

# Rows that do not divide over the devices; biases, experts, and joined kernels.
MESHES: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(fsdp=8),
    "phi3": dict(data=2, fsdp=2, tensor=2),
}
ALL = CONFIGS | FAMILY_CONFIGS
LORA = lora.LoraConfig(rank=2, targets=("down_proj",))


def _read_and_write():
    import os
    from pathlib import Path

    import numpy as np
    import pytest

    from jalign import models, sharding
    from tests import test_two_processes_files as here

    root = Path(os.environ["JALIGN_TEST_FILES"])
    for name, sizes in here.MESHES.items():
        mesh = sharding.make_mesh(**sizes)
        model, params = models.load(root / name, mesh=mesh)
        want = here.random_params(here.Model(here.ALL[name]))
        where = sharding.param_shardings(mesh, model.param_shapes())
        assert jax.tree.map(lambda x: x.sharding, params) == where

        def check(x, y):
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, y[shard.index])

        jax.tree.map(check, params, want)
        models.save(root / f"{name}-again", model, params, max_shard_size=5_000)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("multihost", "blocks"):
            patch.setattr(f"jalign.sharding.{module}.PIECE_BYTES", 1000)
        whole = sharding.gather(params["embed"])["embedding"]
        np.testing.assert_array_equal(whole, want["embed"]["embedding"])
    return here.refusals(root, mesh, model, params)


def refusals(root, mesh, model, params) -> list[str]:
    """What is said on this process when one of the two cannot read, or write."""
    from jalign import models
    from jalign.models.hf_files import WeightFiles
    from jalign.models.hf_writing import TensorWriter

    read = WeightFiles.read

    def no_read(files, name, index=()):
        if name == "model.norm.weight":
            raise OSError(5, "the disk is gone")
        return read(files, name, index)

    def no_add(writer, written, name):
        raise OSError(28, "no space left")

    def fails(action, *given, **how) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            action(*given, **how)
        return f"{type(error.value).__name__}: {error.value}"

    said = [fails(models.load, root / "bad", mesh=mesh)]
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == 1:
            patch.setattr(WeightFiles, "read", no_read)
            patch.setattr(TensorWriter, "add", no_add)
        said.append(fails(models.load, root / "phi3", mesh=mesh))
        given = root / "full", model, params
        said.append(fails(models.save, *given, max_shard_size=5_000))
    adapters = models.lora.init(model, params, LORA, jax.random.key(0))
    models.save_adapter(root / "adapter", model, adapters, LORA, base="base")
    taken = root / "adapter" / "adapter_config.json"  # a file, and so no folder
    said.append(fails(models.save_adapter, taken, model, adapters, LORA, base="base"))
    said.append(fails(models.load, root / str(jax.process_index()), mesh=mesh))

    def no_rename(path, target):
        raise OSError(13, "may not be renamed")

    def export():
        with whole_folder(root / "export") as folder:
            folder.mkdir(exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == 0:
            patch.setattr(Path, "rename", no_rename)
        said.append(fails(export))
    return said


def test_two_processes_read_and_write_what_one_does(tmp_path, monkeypatch):
    for name in MESHES:
        model = Model(ALL[name])
        save(tmp_path / name, model, random_params(model))
    llama = Model(CONFIGS["llama"])
    save(tmp_path / "0", llama, random_params(llama))  # which the second does not see
    bad = random_params(llama)
    bad["embed"]["embedding"][-1, 3] = np.nan  # of the last row, the second one's
    with monkeypatch.context() as patch:
        patch.setattr("jalign.models.hf_weights._all_finite", lambda x: True)
        save(tmp_path / "bad", llama, bad)
    monkeypatch.setenv("JALIGN_TEST_FILES", str(tmp_path))
    first, second = processes.run(_read_and_write)

    assert first[:2] == second[:2]
    assert "1 problem" in first[0] and "embed_tokens.weight is not finite" in first[0]
    assert (
        "1 problem" in first[1]
        and "norm.weight cannot be read: [Errno 5] the disk is gone" in first[1]
    )
    assert "process 1 failed: OSError" in first[2] and "no space left" in first[2]
    assert "no space left" in second[2]
    left = [file.name for file in (tmp_path / "full").iterdir()]
    assert "config.json" not in left and not any(n.endswith(".tmp") for n in left)
    assert "FileExistsError" in first[3]
    assert "process 0 failed: FileExistsError" in second[3]
    assert "process 1 failed: FileNotFoundError" in first[4]
    assert "may not be renamed" in first[5]
    assert "process 0 failed" in second[5] and "may not be renamed" in second[5]
    phi3 = Model(ALL["phi3"])
    adapters = lora.init(phi3, random_params(phi3), LORA, jax.random.key(0))
    again, _ = load_adapter(tmp_path / "adapter", phi3)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    for name in MESHES:
        want, both = random_params(Model(ALL[name])), tmp_path / f"{name}-again"
        _, again = load(both)
        jax.tree.map(np.testing.assert_array_equal, again, want)
        one = tmp_path / f"{name}-one"
        save(one, Model(ALL[name]), again, max_shard_size=5_000)
        names = [
            sorted(file.name for file in folder.iterdir()) for folder in (one, both)
        ]
        assert names[0] == names[1] and len(names[0]) > 6
        for file in names[0]:
            assert (one / file).read_bytes() == (both / file).read_bytes(), file
