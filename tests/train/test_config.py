import pytest

from jalign.train.config import (
    ComputeOptions,
    DPOConfig,
    DPOOptions,
    SFTConfig,
    SFTOptions,
)
from jalign.train.optim import OptimConfig

HERE = dict(model="m", data="d", out="o")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(batch_size=0), "batch_size must be >= 1"),
        (dict(steps=0), "steps must be >= 1"),
        (dict(steps=3, optim=OptimConfig(warmup_steps=3)), "warmup_steps 3 .* steps 3"),
        (
            dict(batch_size=8, compute=ComputeOptions(microbatches=3)),
            "microbatches 3 does not divide batch_size 8",
        ),
    ],
)
def test_contradictions_name_the_fields(wrong, words):
    with pytest.raises(ValueError, match=words):
        SFTConfig(**HERE, **wrong)


@pytest.mark.parametrize(
    "options, wrong, words",
    [
        (DPOOptions, dict(beta=0.0), "beta must be > 0, got 0.0 .*'dpo'"),
        (DPOOptions, dict(loss="sft + dpo:beta=-1"), "beta must be > 0, got -1.0"),
        (DPOOptions, dict(label_smoothing=0.5), r"must be in \[0, 0.5\), got 0.5"),
        (DPOOptions, dict(loss="robust:label_smoothing=0.6"), "got 0.6 .*'robust'"),
        (SFTOptions, dict(label_smoothing=1.0), r"must be in \[0, 1\), got 1.0"),
        (SFTOptions, dict(z_loss=-1.0), "z_loss must be >= 0, got -1.0"),
        (SFTOptions, dict(loss="sft:z_loss=-1e-4"), "z_loss must be >= 0"),
    ],
)
def test_scalars_keep_to_their_range_from_a_flag_or_inside_the_loss(
    options, wrong, words
):
    with pytest.raises(ValueError, match=words):
        options(**wrong)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_loss_of_the_whole_batch_takes_no_micro_batches(name):
    DPOOptions(loss=name)
    words = f"loss '{name}' compares .* microbatches must be 1, got 2"
    with pytest.raises(ValueError, match=words):
        DPOConfig(
            **HERE,
            dpo=DPOOptions(loss=f"dpo + {name}"),
            compute=ComputeOptions(microbatches=2),
        )
