"""Live comparison with transformers on torch: logits in, logits out, every family."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jalign.models import load, save  # noqa: E402
from scripts.make_model_golden import CASES, build, inputs  # noqa: E402

TOLERANCE = 1e-4


def torch_logits(model, tokens, mask=None, **kwargs):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), attention_mask=mask, **kwargs)
    return out.logits.float().numpy()


def jalign_logits(model, params, tokens, **kwargs):
    hidden, _ = jax.jit(model.apply)(params, tokens, **kwargs)
    if model.config.num_labels:
        return np.asarray(model.score(params, hidden))
    return np.asarray(hidden @ model.unembed(params))


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_in_and_out(name, tmp_path):
    """transformers -> save_pretrained -> load -> save -> from_pretrained."""
    prefix, changes = CASES[name]
    theirs = build(prefix, changes)
    tokens, mask = inputs()
    want = torch_logits(theirs, tokens, mask)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    model, params = load(tmp_path / "theirs")
    got = jalign_logits(model, params, tokens, segment_ids=mask)
    if model.config.num_labels:
        got = got[np.arange(3), mask.sum(1) - 1][:, None]
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
    else:
        real = mask > 0
        np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)

    save(tmp_path / "ours", model, params, max_shard_size=12_000)
    again, info = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    back = torch_logits(again.eval(), tokens, mask)
    np.testing.assert_allclose(back, want, atol=1e-6)


@pytest.mark.parametrize("name", ["llama3_rope", "mistral_window", "qwen2", "qwen3"])
def test_packed_rows_equal_transformers_on_each_document(name, tmp_path):
    prefix, changes = CASES[name]
    theirs = build(prefix, changes)
    theirs.save_pretrained(tmp_path)
    tokens, _ = inputs()
    ids = np.array([[1] * 7 + [2] * 5], np.int32)
    positions = np.array([[*range(7), *range(5)]], np.int32)
    parts = [
        torch_logits(theirs, tokens[:1, part]) for part in (slice(7), slice(7, 12))
    ]
    for attention in ("plain", "blocked"):
        model, params = load(tmp_path, attention=attention)
        got = jalign_logits(
            model, params, tokens[:1], positions=positions, segment_ids=ids
        )
        np.testing.assert_allclose(got, np.concatenate(parts, 1), atol=TOLERANCE)


def test_real_checkpoint(real_data, tmp_path):
    folder = real_data / "stories260k"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.random.default_rng(0).integers(3, 512, (2, 300)).astype(np.int32)
    model, params = load(folder)
    want = torch_logits(theirs, tokens)
    got = jalign_logits(model, params, tokens)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    save(tmp_path, model, params, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(torch_logits(again, tokens), want)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("Zoo").input_ids == (
        tokenizer("Zoo").input_ids
    )
