"""FLOPs and bytes of an update, against published runs and products written out."""

import pytest

from jalign import plan
from jalign.plan.work import total

from .test_estimate import LARGE, ON_16, TINY

# Model, topology, rows, length, seconds of a step, TFLOP/s of a chip: MaxText, by its
# READMEs in AI-Hypercomputer/tpu-recipes (training/v5p, training/ironwood).
PUBLISHED_RUNS = [
    ("llama-3.1-405b", "v5p:8x8x8", 1024, 8192, 131.474, 314.5),
    ("llama-3.1-70b", "tpu7x:4x4x4", 256, 8192, 12.20, 1207),
    ("llama-3.1-405b", "tpu7x:4x8x8", 1536, 8192, 98.34, 1261),
]


@pytest.mark.parametrize(
    ("model", "topology", "rows", "length", "s", "rate"), PUBLISHED_RUNS
)
def test_flops_are_those_by_which_published_runs_count(
    model, topology, rows, length, s, rate
):
    found = plan.plan(
        "sft", model, topology=topology, batch_size=rows, max_length=length
    )
    chip = total(found.work.flops) * found.machine.chip.per_chip
    assert chip / s / 1e12 == pytest.approx(rate, rel=2e-3)


def flops(parts):
    return {part.name: part.amount for part in parts}


def test_products_and_attention_written_out():
    T, D, F, N, K, H, L, V = 16, 32, 48, 4, 2, 8, 2, 64
    tokens = 8 * T / 8  # of a device
    settings = dict(max_length=T, batch_size=8, remat=True)
    layers = L * (D * (2 * N + 2 * K) * H + 3 * D * F)
    scores = 4 * N * H * T * L / 2  # a token's, forward
    found = plan.plan("sft", TINY, **settings).work
    assert flops(found.flops) == {
        "products with weights": 6 * (layers + D * V) * tokens,
        "attention": 3 * scores * tokens,
    }
    assert flops(found.again)["products of layers"] == 2 * layers * tokens
    pairs = plan.plan("dpo", TINY, **settings).work
    assert total(pairs.flops) == 2 * total(found.flops)
    assert flops(pairs.again)["logits"] == 2 * D * V * 2 * tokens
    assert flops(pairs.beside)["reference"] == total(pairs.flops) / 3


def test_a_window_sees_fewer_pairs_and_a_token_two_experts_of_eight():
    how = dict(topology="v5p:4x4x4", batch_size=64)
    short, long = (
        flops(plan.plan("sft", "mistral-7b", **how, max_length=n).work.flops)
        for n in (4096, 32768)
    )
    pairs = (4096 * 32768 - 4096**2 / 2) / (4096**2 / 2)
    assert long["attention"] / short["attention"] == pytest.approx(pairs)
    mixture = flops(plan.plan("sft", "mixtral-8x7b", **how, max_length=4096).work.flops)
    D, F, L, V = 4096, 14336, 32, 32000
    weights = L * (D * (2 * 32 + 2 * 8) * 128 + 2 * 3 * D * F + D * 8) + D * V
    assert mixture["products with weights"] == 6 * weights * 4096


def test_adapters_leave_out_products_and_bytes_of_gradients():
    whole = plan.plan("sft", LARGE, **ON_16)
    part = plan.plan("sft", LARGE, **ON_16, lora_rank=8)
    packed = plan.plan("sft", LARGE, **ON_16, lora_rank=8, quantize="nf4")
    again = flops(part.work.again)["products of layers"]
    adapters = 2 * part.num_parameters * 2048  # one row a device
    assert again == flops(whole.work.again)["products of layers"] + adapters
    small = 6 * part.num_parameters * 2048
    ratio = (total(part.work.flops) - small) / total(whole.work.flops)
    assert 2 / 3 < ratio < 0.69  # attention has all of its gradients
    assert flops(packed.work.flops) == flops(part.work.flops)
    sent = {name: flops(p.work.sent) for name, p in (("whole", whole), ("part", part))}
    assert sent["part"]["weights, forward"] == pytest.approx(
        sent["whole"]["weights, forward"], rel=1e-3
    )
    assert sent["part"]["gradients"] < 0.01 * sent["whole"]["gradients"]
    codes = flops(packed.work.sent)["weights, forward"]
    assert 0.2 < codes / sent["part"]["weights, forward"] < 0.3  # 4 bits, not 16


def test_what_is_sent_grows_with_the_axes():
    alone = plan.plan("sft", LARGE, topology="v5p:1x1x1", batch_size=1)
    assert alone.work.sent == () and "sends" not in str(alone)
    found = plan.plan("sft", LARGE, **ON_16).work
    assert round(found.bound / 1e9, 1) == 45.2
    assert 0.85 < total(found.sent) / found.bound < 1
    split = ON_16 | {"mesh": "data=2,fsdp=2,tensor=4"}
    cut = flops(plan.plan("sft", LARGE, **split).work.sent)
    # 6 sums a layer of bfloat16 [4 rows of 2048, 4096], each to and fro.
    assert cut["activations"] == 6 * 32 * 2 * 3 / 4 * 2 * 4 * 2048 * 4096
    parts = plan.plan("sft", LARGE, **(ON_16 | {"batch_size": 64}), microbatches=4)
    assert flops(parts.work.sent)["gradients"] == 4 * flops(found.sent)["gradients"]
    # Groups of 8, so two of them: hidden states of 8 rows, an eighth of the table.
    states, table = 8 * 7 * 2048 * 4096, 8 * 128_256 * 4096 / 8 / 2
    for sent, rows, times in ((found.sent, 1, 1), (parts.work.sent, 4, 4)):
        assert flops(sent)["unembedding"] == rows * states + times * table


def test_a_rollout_is_counted_beside_the_update():
    ppo = plan.plan("ppo", LARGE, **ON_16, num_epochs=2).work
    assert [part.name for part in ppo.beside] == [
        "sampling",
        "passes",
        "critic's updates",
    ]
    once = total(ppo.flops) / 3  # a pass over the rows of the one minibatch
    assert flops(ppo.beside)["passes"] == pytest.approx(3 * once)
    assert flops(ppo.beside)["critic's updates"] == pytest.approx(2 * 3 * once)
    grpo = plan.plan("grpo", LARGE, **ON_16).work
    assert [part.name for part in grpo.beside] == ["sampling"]


@pytest.mark.parametrize(
    ("settings", "bytes_each"), [({}, 2 + 4), ({"lora_rank": 8}, 2)]
)
def test_the_unembedding_lies_in_groups_and_frozen_has_no_gradient(
    settings, bytes_each
):
    found = plan.plan("sft", LARGE, **ON_16, **settings)
    row = next(r for r in found.transient["update"] if r.name == "unembedding")
    assert row.bytes == 128_256 * 4096 // 8 * bytes_each  # 8 members: 8^2 2048 >= V
    assert ("gradient" in row.note) == (bytes_each > 2)
