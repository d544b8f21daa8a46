"""Live comparison with peft on torch: what merging an adapter leaves."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from jalign.models import read_config  # noqa: E402
from jalign.models.hf_checkpoints import Out  # noqa: E402
from jalign.models.merging import merge_adapter  # noqa: E402
from scripts.make_model_golden import CASES, build, inputs  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2", "qwen3"])
def test_a_merged_adapter_is_pefts_merged_model(name, tmp_path):
    """transformers and peft save; jalign merges; transformers reads."""
    build(*CASES[name]).save_pretrained(tmp_path / "base", max_shard_size="12KB")
    torch.manual_seed(0)
    how = {"target_modules": "all-linear", "use_rslora": name == "qwen3"}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **how
    )
    theirs = peft.get_peft_model(build(*CASES[name]), config)
    theirs.save_pretrained(tmp_path / "adapter")
    out = Out(tmp_path / "merged", read_config(tmp_path / "base"))
    merge_adapter(tmp_path / "base", tmp_path / "adapter", out)
    merged = theirs.merge_and_unload()
    ours, info = type(merged).from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = merged.state_dict()
    for key, x in ours.state_dict().items():
        np.testing.assert_allclose(x, want[key], atol=1e-6, err_msg=key)
    tokens, mask = map(torch.tensor, inputs())
    with torch.no_grad():
        logits = [m.eval()(tokens, attention_mask=mask).logits for m in (ours, merged)]
    real = mask > 0
    np.testing.assert_allclose(logits[0][real], logits[1][real], atol=1e-5)
