"""The plan as a person reads it, and where its model may come from."""

import json

import pytest

from jalign import plan
from jalign.models.hf_config import config_to_hf

from .test_estimate import LARGE, ON_16, TINY


def test_table_shows_every_row_and_the_verdict():
    result = plan.plan(LARGE, recipe="dpo", **ON_16)
    text = str(result)
    for row in result.resident + result.transient["update"]:
        assert f"{row.name:<26}{row.bytes / 2**30:9.3f}" in text
    assert "16 x v5e" in text and "8.03 B parameters" in text
    assert text.endswith("fits in 16 GiB (92% usable)")


def test_table_says_what_would_fit():
    result = plan.plan(LARGE, topology="v5e:1x1", batch_size=1)
    assert "does NOT fit" in str(result) and "it would fit on" in str(result)


def test_capacity_of_a_cpu_is_unknown():
    assert plan.plan(TINY).fits is None
    assert "capacity unknown" in str(plan.plan(TINY))


def test_model_from_a_folder_a_file_a_dict_and_a_config(tmp_path):
    raw, _ = config_to_hf(TINY)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    totals = {plan.plan(m).total for m in (str(tmp_path), str(file), raw, TINY)}
    assert len(totals) == 1
    text = plan.run_plan(plan.PlanConfig(model=str(tmp_path)))
    assert "peak (estimate)" in text


def test_a_bad_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"config\.json.*t5"):
        plan.plan(str(tmp_path))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="max_length must be >= 1"):
        plan.PlanConfig(model="x", max_length=0)
