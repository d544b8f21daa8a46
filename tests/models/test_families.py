"""Tests for jalign/models/families.py: each published size adds up."""

import math

import jax
import pytest

from jalign.models import Model
from jalign.models.families import tensors_of
from jalign.models.hf_config import config_from_hf
from tests.models.tiny import CONFIGS, FAMILY_CONFIGS, shapes_of

HF = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GPT = ("n_embd", "n_layer", "n_head", "vocab_size")
# model_type -> keys of the sizes below; then intermediate_size, num_key_value_heads.
KEYS = dict.fromkeys(("gpt2", "gptj"), GPT) | {
    "mpt": ("d_model", "n_layers", "n_heads", "vocab_size"),
    "bloom": ("hidden_size", "n_layer", "n_head", "vocab_size"),
}
WIDTH = {"opt": "ffn_dim", "qwen2_moe": "moe_intermediate_size"}
WIDTH |= {"qwen3_moe": "moe_intermediate_size"}
TIED = dict(tie_word_embeddings=True)
OPT_350M = dict(word_embed_proj_dim=512, do_layer_norm_before=False)
NEW_FALCON = dict(new_decoder_architecture=True, multi_query=False, num_kv_heads=8)
FALCON_RW = dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)
FALCON_11B = NEW_FALCON | dict(num_ln_in_parallel_attn=1, tie_word_embeddings=False)
# As config.json was published -> parameters, a tied embedding once: the arithmetic of
# the model cards.
PUBLISHED = {
    "llama-2-7b": ("llama", 4096, 32, 32, 32000, 11008, None, {}, 6_738_415_616),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 128256, 14336, 8, {}, 8_030_261_248),
    "llama-3.2-1b": ("llama", 2048, 16, 32, 128256, 8192, 8, TIED, 1_235_814_400),
    "mistral-7b": ("mistral", 4096, 32, 32, 32000, 14336, 8, {}, 7_241_732_096),
    "qwen2-0.5b": ("qwen2", 896, 24, 14, 151936, 4864, 2, TIED, 494_032_768),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 151936, 3072, 8, TIED, 596_049_920),
    "opt-125m": ("opt", 768, 12, 12, 50272, 3072, None, {}, 125_239_296),
    "opt-350m": ("opt", 1024, 24, 16, 50272, 4096, None, OPT_350M, 331_196_416),
    "opt-6.7b": ("opt", 4096, 32, 32, 50272, 16384, None, {}, 6_658_473_984),
    "opt-66b": ("opt", 9216, 64, 72, 50272, 36864, None, {}, 65_719_701_504),
    "bloom-560m": ("bloom", 1024, 24, 16, 250880, None, None, {}, 559_214_592),
    "bloom": ("bloom", 14336, 70, 112, 250880, None, None, {}, 176_247_271_424),
    "mpt-7b": ("mpt", 4096, 32, 32, 50432, None, None, {}, 6_649_286_656),
    # The file of falcon-7b says 71 kv heads, and has one.
    "falcon-7b": (
        *("falcon", 4544, 32, 71, 65024, None, None),
        *(dict(num_kv_heads=71), 6_921_720_704),
    ),
    "falcon-40b": (
        *("falcon", 8192, 60, 128, 65024, None, None, NEW_FALCON),
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        *("falcon", 2048, 24, 32, 50304, None, None, FALCON_RW),
        1_311_625_216,
    ),
    "falcon-11b": (
        *("falcon", 4096, 60, 32, 65024, None, None, FALCON_11B),
        11_102_822_400,
    ),
    "pythia-70m": ("gpt_neox", 512, 6, 8, 50304, 2048, None, {}, 70_426_624),
    "pythia-1b": ("gpt_neox", 2048, 16, 8, 50304, 8192, None, {}, 1_011_781_632),
    "pythia-12b": ("gpt_neox", 5120, 36, 40, 50688, 20480, None, {}, 11_846_072_320),
    "gpt-j-6b": ("gptj", 4096, 28, 16, 50400, None, None, {}, 6_050_882_784),
    "gpt2": ("gpt2", 768, 12, 12, 50257, None, None, {}, 124_439_808),
    "gpt2-xl": ("gpt2", 1600, 48, 25, 50257, None, None, {}, 1_557_611_200),
    "gemma-2b": ("gemma", 2048, 18, 8, 256000, 16384, 1, {}, 2_506_172_416),
    "gemma-7b": ("gemma", 3072, 28, 16, 256000, 24576, 16, {}, 8_537_680_896),
    "gemma-2-2b": ("gemma2", 2304, 26, 8, 256000, 9216, 4, {}, 2_614_341_888),
    "gemma-2-27b": (
        *("gemma2", 4608, 46, 32, 256000, 36864, 16, dict(head_dim=128)),
        27_227_128_320,
    ),
    "gemma-3-270m": ("gemma3_text", 640, 18, 4, 262144, 2048, 1, {}, 268_098_176),
    "gemma-3-1b": ("gemma3_text", 1152, 26, 4, 262144, 6912, 1, {}, 999_885_952),
    # Images and text: its text, of which the file says no more than this.
    "gemma-3-4b": (
        *("gemma3", None, None, None, None, None, None),
        dict(
            text_config=dict(
                hidden_size=2560, intermediate_size=10240, num_hidden_layers=34
            )
        ),
        3_880_263_168,
    ),
    "gemma-3-27b": (
        *("gemma3_text", 5376, 62, 32, 262208, 21504, 16, dict(head_dim=128)),
        27_009_346_304,
    ),
    "phi-3-mini": ("phi3", 3072, 32, 32, 32064, 8192, 32, {}, 3_821_079_552),
    "phi-4-mini": ("phi3", 3072, 32, 24, 200064, 8192, 8, TIED, 3_836_021_760),
    "olmo-2-7b": ("olmo2", 4096, 32, 32, 100352, 11008, 32, {}, 7_298_617_344),
    "smollm3-3b": ("smollm3", 2048, 36, 16, 128256, 11008, 4, {}, 3_075_098_624),
    "granite-3.1-8b": ("granite", 4096, 40, 32, 49155, 12800, 8, TIED, 8_170_848_256),
    "mixtral-8x7b": ("mixtral", 4096, 32, 32, 32000, 14336, 8, {}, 46_702_792_704),
    "qwen1.5-moe-a2.7b": (
        *("qwen2_moe", 2048, 24, 16, 151936, 1408, 16),
        *({}, 14_315_784_192),
    ),
    "qwen3-30b-a3b": (
        *("qwen3_moe", 2048, 48, 32, 151936, 768, 4, dict(head_dim=128)),
        30_532_122_624,
    ),
}


def published(name):
    """(config.json, number of parameters)."""
    family, *sizes, width, kv_heads, more, count = PUBLISHED[name]
    raw = dict(zip(KEYS.get(family, HF), sizes, strict=True))
    raw[WIDTH.get(family, "intermediate_size")] = width
    raw["num_key_value_heads"] = kv_heads
    known = {key: value for key, value in raw.items() if value is not None}
    return {"model_type": family} | known | more, count


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes_have_the_published_number_of_parameters(name):
    raw, count = published(name)
    shapes = Model(config_from_hf(raw)).param_shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


ALL = CONFIGS | FAMILY_CONFIGS


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_parameter_has_exactly_one_row(name):
    config = ALL[name]
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes_of(Model(config)))
    paths = ["/".join(str(k.key) for k in path) for path, _ in flat]
    assert sorted(paths) == sorted(row.path for row in tensors_of(config))


@pytest.mark.parametrize("name", sorted(ALL))
def test_rows_are_unique(name):
    rows = tensors_of(ALL[name])
    assert len({row.name for row in rows}) == len(rows)
