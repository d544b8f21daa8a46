"""Models by name: the parameters that their cards tell, and a plan without a hub."""

import math
from pathlib import Path

import jax
import pytest

from jalign import plan
from jalign.models import Model
from jalign.models.families import FAMILIES
from jalign.models.hf_config import config_from_hf
from jalign.plan.published import PUBLISHED

# One of each family, and of each way in which its sizes differ.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "opt-350m": 331_196_416,
    "opt-66b": 65_719_701_504,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
    "mpt-7b": 6_649_286_656,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-11b": 11_102_822_400,
    "pythia-70m": 70_426_624,
    "pythia-12b": 11_846_072_320,
    "gpt-j-6b": 6_050_882_784,
    "gpt2-xl": 1_557_611_200,
    "gemma-2b": 2_506_172_416,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "olmo-2-32b": 32_234_279_936,
    "smollm3-3b": 3_075_098_624,
    "granite-3.1-8b": 8_170_848_256,
    "opt-125m": 125_239_296,
    "opt-6.7b": 6_658_473_984,
    "pythia-1b": 1_011_781_632,
    "gpt2": 124_439_808,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "olmo-2-7b": 7_298_617_344,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_number_of_parameters(name):
    shapes = Model(config_from_hf(PUBLISHED[name])).param_shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == COUNTS[name]


def test_every_name_is_a_config():
    for name, raw in PUBLISHED.items():
        assert config_from_hf(raw).vocab_size > 30_000, name


def test_a_plan_takes_a_name():
    found = plan.plan("sft", "pythia-70m", topology="v5e:1x1", batch_size=1)
    assert found.num_parameters == COUNTS["pythia-70m"] and found.fits


def test_2050_learned_positions_are_not_cut_over_tensor():
    mesh = dict(topology="v5e:4x4", mesh="fsdp=4,tensor=4", batch_size=16)
    assert plan.plan("sft", "opt-125m", **mesh).fits


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (17.40G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        "memory space hbm. Used 17.40G of 15.75G hbm. Exceeded hbm capacity by 1.65G.",
    ],
)
def test_a_compiler_that_gives_up_says_that_it_does_not_fit(monkeypatch, said):
    def gives_up(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr("jalign.plan.compiled.compiled_step", gives_up)
    monkeypatch.setattr("jalign.sharding.topology_devices", lambda _: jax.devices()[:1])
    found = plan.plan("sft", "pythia-70m", topology="v5e:1x1", compile=True)
    assert found.fits is False and found.peak == int(17.4 * 2**30)
    assert "gives up" in str(found)


def test_the_page_of_models_names_every_family_and_how_many_are_published():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
    assert f"the sizes of {len(PUBLISHED)} of these models" in page
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"[one of {len(FAMILIES)} families]" in readme
